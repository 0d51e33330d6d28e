"""``python -m cpfold_train bench-data SHARDS``: how fast a data worker is, and what its part of a sample takes."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing as mp
import os
import statistics
import time
from typing import Any

import torch

from cpfold_train.data.stream.batch import Augmentation, collate, make_crop
from cpfold_train.data.stream.crop import CROPS
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.stream.transfer import pack
from cpfold_train.errors import ConfigError
from cpfold_train.interrupts import before_spawning
from cpfold_train.memory import now_mib, peak_mib, reset_peak, return_large_tensors
from cpfold_train.parallel.grid import Grid, parse_grid
from cpfold_train.simulate.bench.measure import machine
from cpfold_train.tables import make_console, make_table

AUGMENTATION = Augmentation(random_templates=True, pocket=0.15, contact=0.15)
"""As training draws, except that all have as many MSA rows as they may."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help=".tar files, or quoted globs of them")
    add("--crop", default="384,768,1536,3072", metavar="N,N", help="crop sizes (default: %(default)s)")
    add("--grid", default="1x1,2x2", metavar="RxC,RxC", help="grids; rank 0 is measured (default: %(default)s)")
    kinds = f"{', '.join(CROPS)} crops (default: %(default)s)"
    add("--kind", choices=CROPS, metavar="KIND", default="neighbourhood", help=kinds)
    add("--max-msa-rows", type=int, default=64, metavar="S", help="most MSA rows of a sample (default: 64)")
    add("--samples", type=int, default=8, metavar="K", help="timed samples, of which the mean counts (default: 8)")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Measure each crop size on each grid in a process of its own, and print the results.

    Raises:
        ConfigError: an option cannot work, or no sample is as large as a crop.
    """
    grids = [parse_grid(text) for text in args.grid.split(",")]
    try:
        crops = [int(text) for text in args.crop.split(",")]
    except ValueError:
        raise ConfigError(f"--crop {args.crop} is not a list of sizes: type for example --crop 384,768") from None
    if min(*crops, args.samples, args.max_msa_rows) < 1:
        raise ConfigError("crop sizes, --samples and --max-msa-rows start at 1: type for example --samples 8")
    largest = max(entry.tokens for entry in open_shards(args.shards))
    if max(crops) > largest:
        raise ConfigError(f"the largest sample has {largest} tokens: type --crop {largest} or smaller, or other SHARDS")
    # As a data worker computes.
    os.environ["OMP_NUM_THREADS"] = "1"
    cases = []
    for crop, grid in itertools.product(crops, grids):
        # Memory that an earlier case leaves to the process would hide what a later one takes.
        before_spawning()
        with mp.get_context("spawn").Pool(1) as pool:
            case = (args.shards, crop, grid, args.kind, args.max_msa_rows, args.samples)
            cases.append(pool.apply(measure_case, case))
    _show({"cases": cases, "max_msa_rows": args.max_msa_rows, "kind": args.kind, "machine": machine()}, args.json)


def measure_case(
    shards: list[str], crop_size: int, grid: tuple[int, int], kind: str, max_msa_rows: int, samples: int
) -> dict[str, Any]:
    """Make samples as a worker of rank 0 does, in turn from all that have at least ``crop_size`` tokens.

    Returns:
        ``read_ms``, ``crop_ms`` and ``tile_ms``, means a sample in CPU time, which leaves out what else the machine
        does; ``samples_per_s`` by them; ``batch_mib``, the tensors of the last one; and ``peak_mib``, the most memory
        in use above what the process held before its first one.
    """
    return_large_tensors()
    sharding = Grid(*grid)
    entries = [entry for entry in open_shards(shards) if entry.tokens >= crop_size]
    seconds: dict[str, list[float]] = {"read": [], "crop": [], "tile": []}
    gc.collect()
    device = torch.device("cpu")
    reset_peak(device)
    before = now_mib(device)
    # The first sample finds cold caches: it is not timed.
    for number in range(samples + 1):
        began = time.process_time()
        structure, alignments, templates = read_sample(entries[number % len(entries)])
        read = time.process_time()
        settings = {"crop_size": crop_size, "max_msa_rows": max_msa_rows, "crop": {kind: 1.0}}
        draw = (0, 0, number)
        crop = make_crop(structure, alignments, templates, augmentation=AUGMENTATION, draw=draw, **settings)
        cropped = time.process_time()
        batch_mib = pack(collate([crop], sharding))[0].nbytes / 2**20
        done = time.process_time()
        if number:
            for stage, took in (("read", read - began), ("crop", cropped - read), ("tile", done - cropped)):
                seconds[stage].append(took)
    mean = {f"{stage}_ms": 1e3 * statistics.mean(took) for stage, took in seconds.items()}
    return {
        "crop": crop_size,
        "grid": str(sharding),
        **mean,
        "samples_per_s": 1e3 / sum(mean.values()),
        "batch_mib": batch_mib,
        "peak_mib": peak_mib(device) - before,
        "entries": len(entries),
    }


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console, spec = make_console(), result["machine"]
    table = make_table(
        "crop, grid, samples/s a worker, ms a sample, of it reading, cropping, tiles, batch MiB, peak MiB",
        title=f"{result['kind']} crops, {result['max_msa_rows']} MSA rows",
        caption=f"{spec['cpu']}, one thread, CPU time",
    )
    for case in result["cases"]:
        stages = [case[f"{stage}_ms"] for stage in ("read", "crop", "tile")]
        numbers = [sum(stages), *stages, case["batch_mib"], case["peak_mib"]]
        rate = f"{case['samples_per_s']:.2f}"
        table.add_row(f"{case['crop']:,}", case["grid"], rate, *(f"{number:,.0f}" for number in numbers))
    console.print(table)
