"""``cpfold-train SUBCOMMAND``, or ``python -m cpfold_train SUBCOMMAND``; its code is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from cpfold_train import VERSION
from cpfold_train.config.world import is_first_rank
from cpfold_train.errors import ConfigError, DataError, RunError
from cpfold_train.interrupts import quit_on_interrupt
from cpfold_train.paths import train_command

TRAIN = "train"
SUBCOMMANDS = {
    TRAIN: ("cpfold_train.cli.train", "train: KEY=VALUE ..., as python train.py"),
    "resume": ("cpfold_train.cli.resume", "go on with a run: from its newest checkpoint, with its own configuration"),
    "prepare": ("cpfold_train.cli.prepare", "turn structure files and alignments into training shards"),
    "inspect": ("cpfold_train.data.inspect.command", "list the samples of shards, or describe and draw one of them"),
    "compare": ("cpfold_train.reports.compare", "which run is better, and what was different"),
    "export-boltz": ("cpfold_train.checkpoints.export", "write a run's weights as a checkpoint of boltz"),
    "consolidate": ("cpfold_train.checkpoints.consolidate", "turn a checkpoint of a run with FSDP into one file"),
    "predict": ("cpfold_train.cli.predict", "sample structures with a checkpoint, on a grid of ranks"),
    "evaluate": ("cpfold_train.cli.evaluate", "score predicted structures against the truth"),
    "plan": ("cpfold_train.cli.plan", "memory, communication and time of a run on any grid, before it is started"),
    "bench": ("cpfold_train.cli.bench", "time an op on a grid of ranks, and count what it sends and holds"),
    "gpu-check": ("cpfold_train.cli.gpu_check", "prove and measure this machine's GPUs within ten minutes"),
    "kernels": ("cpfold_train.cli.kernels", "compile the Triton kernels without a GPU, and say what they became"),
    "bench-data": ("cpfold_train.cli.bench_data", "time a data worker, and measure the memory that its samples take"),
    "completion": (
        "cpfold_train.cli.completion",
        "print a script that lets a shell complete commands, options, keys",
    ),
}
"""Name of each subcommand: module with ``add_arguments(parser)`` and ``run(args)``, and a line of help. What is typed
after ``train`` is Hydra's to read."""


PROGRAM = "cpfold-train" if Path(sys.argv[0]).name == "cpfold-train" else "python -m cpfold_train"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 2 where the person at the keyboard has to change something."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [TRAIN]:
        training = [*train_command(), *argv[1:]]
        # It replaces this process, so that signals and the exit code are the run's.
        os.execv(training[0], training)
    if not argv or argv[0] not in SUBCOMMANDS:
        parser = argparse.ArgumentParser(prog=PROGRAM)
        parser.add_argument("--version", action="version", version=VERSION)
        commands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
        for name, (_, summary) in SUBCOMMANDS.items():
            commands.add_parser(name, help=summary)
        parser.parse_args(argv)
    name, (module, summary) = argv[0], SUBCOMMANDS[argv[0]]
    command = importlib.import_module(module)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=summary)
    parser.add_argument("--version", action="version", version=VERSION)
    command.add_arguments(parser)
    # Options and KEY=VALUE in any order.
    args = parser.parse_intermixed_args(argv[1:])
    try:
        command.run(args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> int:
    """The command itself: as :func:`main`, and Ctrl-C ends it with one line."""
    quit_on_interrupt(is_first_rank)
    return main()


if __name__ == "__main__":
    sys.exit(command())
