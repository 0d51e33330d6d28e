"""Values that a shell and Hydra take as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def hydra_quoted(value: str | Path) -> str:
    """A string as a value that Hydra takes as it is: backslashes count only where a quote follows them."""
    return _quoted(str(value), "'")


def typed(key: str, value: str) -> str:
    """What to type, in a shell, for a key whose value Hydra would take for something else.

    Args:
        key: name of the key.
        value: a string, or a list of strings in brackets, whose quotes are gone.
    """
    if value.startswith("[") and value.endswith("]"):
        items = (item.strip().strip("'\"") for item in value[1:-1].split(","))
        return shlex.quote(f"{key}=[{','.join(map(_in_double_quotes, items))}]")
    return shlex.quote(f"{key}={_in_double_quotes(value)}")


def _in_double_quotes(value: str) -> str:
    """For people: single quotes are the shell's."""
    return _quoted(value, '"')


def _quoted(value: str, quote: str) -> str:
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda found: 2 * found[1] + (found[2] and f"\\{quote}"), value)
    return f"{quote}{escaped}{quote}"
