"""``python -m cpfold_train consolidate CHECKPOINT OUT``: a checkpoint of a run with FSDP as one file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cpfold_train.errors import ConfigError
from cpfold_train.whole_file import whole_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory, as RUN/checkpoints/last.ckpt")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, as a run without FSDP would have")


def run(args: argparse.Namespace) -> None:
    """Write the file and say how to use it. It is read into memory whole.

    Raises:
        ConfigError: there is no complete checkpoint of a run with FSDP, or ``out`` is a directory.
    """
    from cpfold_train.checkpoints.sharded import is_sharded_checkpoint, load_sharded

    if not is_sharded_checkpoint(args.checkpoint):
        raise ConfigError(
            f"{args.checkpoint} is no checkpoint of a run with parallel.fsdp=true: type the directory of one, as "
            "runs/DATE/TIME/checkpoints/last.ckpt"
        )
    if args.out.is_dir():
        raise ConfigError(f"{args.out} is a directory: type the name of a file, as {args.out / 'last.ckpt'}")
    checkpoint = load_sharded(args.checkpoint, None)
    with whole_file(args.out, "wb") as file:
        torch.save(checkpoint, file)
    print(f"{args.out}: all of {args.checkpoint}, step {checkpoint['global_step']}")
    print(
        "predict and export-boltz read it, and a run resumes from it with ckpt_path, on any grid, with FSDP or without"
    )
