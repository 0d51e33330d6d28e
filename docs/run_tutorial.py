"""Run the commands of docs/tutorial.md, and write below each what it prints.

python docs/run_tutorial.py            in a temporary directory; writes docs/tutorial.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"```bash\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """The commands of a page, each with the output that stands below it."""
    return _BLOCK.findall(page)


def run_all(page: str, folder: Path, instead: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Run the commands in a folder that has the data of the checkout, one after the other.

    Args:
        page: the text.
        folder: an empty one.
        instead: texts of commands, and what is run instead of them.

    Yields:
        Each command and what it printed, in 80 columns.

    Raises:
        RuntimeError: a command failed.
    """
    for name in ("data", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    for command, _ in commands(page):
        typed = command
        for old, new in (instead or {}).items():
            typed = typed.replace(old, new)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", typed],
            cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{typed} ended with exit code {done.returncode}:\n{done.stdout}")
        yield command, done.stdout


def main() -> None:
    """Write the page."""
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        for command, printed in run_all(page, Path(folder)):
            print(f"$ {command}{printed}", flush=True)
            text = "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())
            text = re.sub(r"\n{3,}", "\n\n", text).replace(f"{ROOT}/", "")
            page = _BLOCK.sub(
                lambda found, c=command, t=text: f"```bash\n{c}```\n\n```text\n{t}```" if found[1] == c else found[0],
                page,
            )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
