"""``python -m cpfold_train kernels``: what the compiler makes of the Triton kernels, on a machine without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from cpfold_train.errors import ConfigError
from cpfold_train.kernels.compiled import ARCHITECTURES, KIB, Compiled, compiled, launches, require_compiler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    known = ", ".join(ARCHITECTURES)
    parser.add_argument("--arch", default="sm_90", metavar="ARCH", help=f"one of {known} (default: sm_90)")
    parser.add_argument(
        "--only", default="", metavar="TEXT,...", help="kernels whose names have one of these in them (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def run(args: argparse.Namespace) -> None:
    """Compile every kernel and print what it became.

    Raises:
        ConfigError: this machine cannot compile for the architecture.
    """
    require_compiler(args.arch)
    chosen = [one for one in launches(args.arch) if any(text in one.name for text in args.only.split(","))]
    if not chosen:
        names = ", ".join(one.name for one in launches(args.arch))
        raise ConfigError(f"--only {args.only} is in the name of no kernel: type a part of one of {names}")
    found = [compiled(one, args.arch) for one in track(chosen, "compiling", console=Console(stderr=True))]
    if args.json:
        print(json.dumps([asdict(kernel) for kernel in found], indent=1))
    elif args.markdown:
        print(_as_markdown(found))
    else:
        _show(found, args.arch)


HEADS = ("kernel", "warps", "regs", "spills", "KiB", "blocks", "matrix", "exp", "atomics", "loop")


def _row(one: Compiled) -> list[str]:
    """What is told of a kernel, under :data:`HEADS`."""
    return [
        one.kernel,
        str(one.warps),
        str(one.registers),
        f"{one.stores_spilled}+{one.loads_spilled}",
        f"{one.fsdp_bytes / KIB:.0f}",
        str(one.blocks),
        ", ".join(f"{count} {name}" for name, count in one.matrix.items()) or "0",
        str(one.exponentials),
        str(one.atomics),
        str(one.loop or "-"),
    ]


def _as_markdown(found: list[Compiled]) -> str:
    rows = [list(HEADS), ["---"] * len(HEADS), *map(_row, found)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _show(found: list[Compiled], arch: str) -> None:
    limit = ARCHITECTURES[arch].shared_block // KIB
    first, *others = HEADS
    table = Table(
        Column(first, overflow="fold"),
        *others,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"Triton's kernels as compiled for {arch}",
        caption=f"regs: registers of a thread; spills: stores and loads of local memory; KiB: shared memory of a "
        f"block, of {limit}; blocks: on a multiprocessor; matrix, exp, atomics: instructions; loop: instructions of "
        "the innermost loop",
    )
    for one in found:
        table.add_row(*_row(one))
    # Names are long, and what is no terminal is no wider than 80 columns by default.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
