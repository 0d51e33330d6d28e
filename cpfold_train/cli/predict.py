"""``python -m cpfold_train predict CHECKPOINT INPUTS``: sample structures on a grid of ranks."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfold_train.config.world import (
    IGNORED,
    World,
    device_here,
    ignore_other_launchers,
    is_first_rank,
    plan_world,
)
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.kernels.choice import KERNELS, PACKAGES, is_installed
from cpfold_train.parallel.grid import parse_grid
from cpfold_train.predict import PRECISIONS
from cpfold_train.tables import make_console, on_terminal
from cpfold_train.vocabulary import FEATURE_SETS, FEATURES_TOLD

if TYPE_CHECKING:
    from cpfold_train.predict.results import Origin

_TIMEOUT = timedelta(minutes=30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="that training wrote: runs/.../last.ckpt")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help=".tar shards, .cif, .bcif, .pdb, .fasta, .yaml, or folders of these"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives a folder for each input")
    parser.add_argument("--id", action="append", default=[], metavar="ID", help="only this input; can be repeated")
    parser.add_argument("--msa", type=Path, metavar="FOLDER", help="alignments ENTRY_CHAINS_LABEL.a3m of the inputs")
    parser.add_argument("--grid", default="1x1", metavar="RxC", help="ranks that share an input (default: 1x1)")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="structures of each input (default: 5)")
    parser.add_argument("--sampling-steps", type=int, default=200, metavar="N", help="of the diffusion (default: 200)")
    parser.add_argument("--recycling-steps", type=int, default=3, metavar="N", help="of the trunk (default: 3)")
    parser.add_argument("--max-msa-rows", type=int, default=8192, metavar="N", help="most MSA rows (default: 8192)")
    parser.add_argument("--crop", type=int, metavar="N", help="most tokens of an input (default: all of them)")
    parser.add_argument(
        "--features", choices=FEATURE_SETS, help="as data.features in training (default: those of the checkpoint)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="(default: %(default)s)")
    parser.add_argument("--kernels", choices=KERNELS, default=KERNELS[0], help="as of train.py (default: %(default)s)")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--weights", choices=("average", "raw"), help="of the checkpoint (default: average if it has one)"
    )
    parser.add_argument("--overwrite", action="store_true", help="predict also what DIR has already")


def run(args: argparse.Namespace) -> None:
    """Predict what is not there yet.

    Raises:
        ConfigError: an option or a path cannot work.
        DataError: inputs could not be read, after all others have been predicted.
    """
    least = {"samples": 1, "sampling_steps": 2, "recycling_steps": 0, "max_msa_rows": 1, "crop": 1}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is too small: type {low} or more")
    parse_grid(args.grid)
    _check_kernels(args)
    if left := ignore_other_launchers():
        print(f"note: {IGNORED}: {', '.join(left)}", file=sys.stderr)
    world = plan_world(args.grid, 1, 1, args.accelerator)
    # Torch and Lightning take seconds to import; a wrong option is to be told at once.
    from cpfold_train.checkpoints import load as checkpoint
    from cpfold_train.data.inputs.inputs import find_queries
    from cpfold_train.predict.predictor import Settings
    from cpfold_train.predict.results import Origin, completed

    queries = find_queries(args.inputs, args.msa, args.id)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be made ({error.strerror}): type another folder") from error
    features, note = checkpoint.choose_features(args.checkpoint, args.features)
    settings = Settings(
        samples=args.samples,
        sampling_steps=args.sampling_steps,
        recycling_steps=args.recycling_steps,
        max_msa_rows=args.max_msa_rows,
        crop_size=args.crop,
        seed=args.seed,
        features=features,
    )
    weights = checkpoint.choose_weights(args.checkpoint, args.weights)
    origin = Origin(weights, settings, args.precision, str(world.grid))
    # Before the ranks meet, so that none of them has written anything yet and all choose the same.
    there = {} if args.overwrite else {query.id: completed(args.out, query.id) for query in queries}
    for name, about in there.items():
        if about is not None and (difference := origin.difference(about)):
            raise ConfigError(
                f"--out {args.out} has {name} already, {difference}: type another --out, or --overwrite to predict it "
                "again"
            )
    left = [query for query in queries if there.get(query.id) is None]
    if is_first_rank() and len(left) < len(queries):
        print(
            f"{len(queries) - len(left)} of {len(queries)} are in {args.out} already: --overwrite predicts them again"
        )
    if left:
        if is_first_rank():
            print(f"features: {FEATURES_TOLD[features]}", file=sys.stderr)
            if note:
                print(f"note: {note}", file=sys.stderr)
        _predict(args, world, left, origin)


def _check_kernels(args: argparse.Namespace) -> None:
    """Raise ConfigError for kernels that were asked for and cannot compute this."""
    if args.kernels in PACKAGES and not is_installed(args.kernels):
        raise ConfigError(f"--kernels {args.kernels} needs the {PACKAGES[args.kernels]} package: type --kernels auto")
    if args.kernels in PACKAGES and args.precision == "64-true":
        raise ConfigError(f"--kernels {args.kernels} has no fp64: type --kernels torch, or --precision 32-true")
    if args.kernels in PACKAGES and device_here(args.accelerator) == "cpu":
        raise ConfigError(f"--kernels {args.kernels} needs GPUs: type --kernels auto")


def _predict(args: argparse.Namespace, world: World, queries: list[Any], origin: Origin) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from cpfold_train.checkpoints import load as checkpoint
    from cpfold_train.model.config import MemoryConfig
    from cpfold_train.predict.predictor import Predictor, Queries
    from cpfold_train.predict.progress import QueryBar, QueryLines
    from cpfold_train.predict.results import PredictionFolder
    from cpfold_train.training.apply import set_up_process
    from cpfold_train.training.gpus import set_up_gpus
    from cpfold_train.training.strategy import GridStrategy

    set_up_process(MemoryConfig(), compile=False)
    if device_here(args.accelerator) == "gpu":
        set_up_gpus(tf32=False)
    model = checkpoint.load_model(args.checkpoint, origin.weights.weights)
    results = PredictionFolder(args.out, origin)
    grid = world.grid
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        precision=args.precision,
        strategy=GridStrategy(grid.rows, grid.cols, 1, _TIMEOUT, "auto", args.kernels),
        callbacks=[QueryBar() if on_terminal() else QueryLines()],
        enable_progress_bar=on_terminal(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Views made in inference mode cannot be saved by the ops' recomputation.
        inference_mode=False,
    )
    module = Predictor(model, origin.settings, results)
    tiles = Queries(queries, trainer.strategy, origin.settings)
    trainer.predict(module, DataLoader(tiles, batch_size=None), return_predictions=False)
    if is_first_rank():
        if results.rows:
            make_console().print(results.table())
        print(f"{len(queries) - len(results.failures)} of {len(queries)} predicted, in {args.out}")
    if results.failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in results.failures.items())
        raise DataError(f"{len(results.failures)} of {len(queries)} inputs cannot be used: {told}")
