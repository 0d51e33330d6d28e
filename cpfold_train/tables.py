"""Tables on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

_WIDTH_OF_FILES = 120
_NARROW = 6
"""Least width of a column that may be folded."""


def on_terminal() -> bool:
    """Whether what is printed can be drawn over: what goes into a file or a pipe cannot."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def make_console(stderr: bool = False) -> Console:
    """The terminal; in a pipe or a file nothing limits the width but ``COLUMNS``, and rich would take 80 columns."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console


def print_whole(console: Console, table: Table) -> None:
    """Print a table with its ``whole`` columns complete, however narrow the terminal is."""
    cells = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    least = sum(max(map(cell_len, own)) + 2 if column.no_wrap else _NARROW for column, own in zip(table.columns, cells))
    width, console.width = console.width, max(console.width, least)
    console.print(table, crop=False)
    console.width = width


def make_table(columns: str, text: str = "", whole: str = "", **settings: Any) -> Table:
    """An empty table.

    Args:
        columns: headers, separated by commas.
        text: those of columns of text, which are aligned left.
        whole: those of columns whose cells are never broken or cut; for :func:`print_whole`.
        settings: title and caption.
    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), **settings)
    left, unbroken = text.split(", "), whole.split(", ")
    for column in columns.split(", "):
        justify: JustifyMethod = "left" if column in left else "right"
        # What does not fit goes on in the next line: rich would cut it.
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in unbroken)
    return table


def make_block(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what is to be said of each, which goes on below itself where the terminal is too narrow; a word that is
    longer than a line is broken."""
    block = Table.grid(padding=(0, 2, 0, 0))
    block.add_column(no_wrap=True)
    block.add_column(overflow="fold")
    for name, text in rows:
        block.add_row(Text(name, "bold"), Text(text))
    return block
