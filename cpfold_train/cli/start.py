"""What starts a run: its first line, before torch is imported, which takes seconds."""

from __future__ import annotations

import sys

from cpfold_train import VERSION
from cpfold_train.config.world import is_first_rank
from cpfold_train.interrupts import quit_on_interrupt


def main() -> None:
    """Say that the run starts, then do what the command line asks for."""
    quit_on_interrupt(is_first_rank)
    if is_first_rank() and is_run(sys.argv[1:]):
        print(f"{VERSION}: starting", file=sys.stderr, flush=True)
    from cpfold_train.cli import train

    train.main()


def is_run(words: list[str]) -> bool:
    """Whether the words of a command line ask for a run or a sweep, and not for help or a configuration."""
    return all(not word.startswith("-") or word in ("-m", "--multirun") for word in words)


if __name__ == "__main__":
    main()
