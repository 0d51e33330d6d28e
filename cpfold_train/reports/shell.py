"""Commands that can be copied from the terminal."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

_INDENT = "    "


def command(*words: str | Path) -> list[str]:
    """A command of this project, as words: of the console script where the shell finds it."""
    program = ["cpfold-train"] if shutil.which("cpfold-train") else ["python", "-m", "cpfold_train"]
    return [*program, *map(str, words)]


def pasted(words: Sequence[str], width: int) -> str:
    """The words quoted for the shell, continued on lines of at most this many columns; a longer word has its own."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(_INDENT + word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def shown(path: Path) -> str:
    """A path as short as it can be typed here: from the working directory on, where it lies below that."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
