"""Tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH_OF_FILES = 120


def make_console() -> Console:
    """The terminal; in a pipe or a file nothing limits the width, and rich would take 80 columns."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


def make_table(columns: str, text: str = "", **settings: Any) -> Table:
    """An empty table.

    Args:
        columns: headers, separated by commas.
        text: those of columns of text, which are aligned left.
        settings: title and caption.
    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), **settings)
    left = text.split(", ")
    for column in columns.split(", "):
        table.add_column(column, justify="left" if column in left else "right")
    return table
