"""``python -m cpfold_train SUBCOMMAND``. A subcommand's code is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys

from cpfold_train.errors import ConfigError, DataError, RunError

SUBCOMMANDS = {
    "prepare": ("cpfold_train.data.prepare.command", "turn structure files and alignments into training shards"),
    "inspect": ("cpfold_train.data.inspect", "list the samples of shards, or describe and draw one of them"),
    "compare": ("cpfold_train.training.compare", "compare the loss curves of runs, such as one on each grid"),
    "export-boltz": ("cpfold_train.training.boltz_export", "write a run's weights as a checkpoint of boltz"),
    "consolidate": ("cpfold_train.training.consolidate", "turn a checkpoint of a run with FSDP into one file"),
    "predict": ("cpfold_train.predict.command", "sample structures with a checkpoint, on a grid of ranks"),
    "evaluate": ("cpfold_train.evaluate.command", "score predicted structures against the truth"),
    "plan": ("cpfold_train.plan.command", "memory, communication and time of a run on any grid, before it is started"),
    "bench": ("cpfold_train.bench.command", "time an op on a grid of ranks, and count what it sends and holds"),
    "gpu-check": ("cpfold_train.gpu_check.command", "prove and measure this machine's GPUs within ten minutes"),
    "kernels": ("cpfold_train.kernels.command", "compile the Triton kernels without a GPU, and say what they became"),
    "bench-data": ("cpfold_train.bench.data", "time a data worker, and measure the memory that its samples take"),
}
"""Name of each subcommand: module with ``add_arguments(parser)`` and ``run(args)``, and a line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 2 where the person at the keyboard has to change something."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m cpfold_train")
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)
    for name, (module, summary) in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    try:
        importlib.import_module(SUBCOMMANDS[args.command][0]).run(args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
