"""``python -m cpfold_train resume RUN [KEY=VALUE ...]``: go on with a run, in its directory or in a new one."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from cpfold_train.config.quoting import hydra_quoted
from cpfold_train.config.recorded import newest_checkpoint
from cpfold_train.errors import ConfigError
from cpfold_train.paths import train_command
from cpfold_train.reports.record import RESOLVED

_SETTING = re.compile(r"[a-z_.]+=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, such as runs/DATE/TIME")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys that are to have other values than in the run, such as trainer.max_steps=300; what differs, and "
        "what that does, is printed",
    )
    parser.add_argument(
        "--fork",
        nargs="?",
        const="",
        metavar="DIR",
        help="leave the run as it is, and go on from it in this directory (default: a new one, named by the time)",
    )
    parser.epilog = (
        "The run goes on from its newest complete checkpoint, on the same or another grid, with its own configuration. "
        "Under torchrun or SLURM, type train.py resume=RUN [KEY=VALUE ...] instead."
    )


def run(args: argparse.Namespace) -> None:
    """Replace this process by the training run.

    Raises:
        ConfigError: there is nothing to go on from.
    """
    if args.fork and _SETTING.match(args.fork):
        # An option with an optional value takes the word after it.
        args.fork, args.settings = "", [args.fork, *args.settings]
    if wrong := next((setting for setting in args.settings if "=" not in setting), None):
        raise ConfigError(f"{wrong} is no KEY=VALUE: type one run, and keys such as trainer.max_steps=300")
    os.execv((training := [*train_command(), *keys(args.run, args.fork), *args.settings])[0], training)


def keys(run_dir: Path, fork: str | None) -> list[str]:
    """What is typed after ``train.py`` to go on with a run, or from it in the directory ``fork``; an empty one is named
    by the time. A fork is at the run's position in the schedule, wherever that was told to start.

    Raises:
        ConfigError: the run has no complete checkpoint to go on from.
    """
    if fork is None:
        return [f"resume={hydra_quoted(run_dir)}"]
    words = [f"config_from={hydra_quoted(run_dir / RESOLVED)}", f"ckpt_path={hydra_quoted(newest_checkpoint(run_dir))}"]
    words.append("optim.start_step=null")
    return [*words, *([f"hydra.run.dir={hydra_quoted(fork)}"] if fork else [])]
