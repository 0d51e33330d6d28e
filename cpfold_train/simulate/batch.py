"""The features that the planner's step is given: those of the largest sample, or those of the data."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from cpfold_train.config.schema import TrainConfig
from cpfold_train.data.schema import FEATURES, ON_HOST
from cpfold_train.data.stream.padding import in_buckets
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import ATOMS_PER_TOKEN
from cpfold_train.training.datamodule import TileData

CHAINS = 4
HOMOTETRAMER = {"chain": CHAINS, "copy": CHAINS, "order": 2}
"""What the planned sample is: its chains, the copies of each, and other orders of a residue's equivalent atoms."""


def assumed_batch(config: TrainConfig, grid: Grid, side: int = 1) -> dict[str, Tensor]:
    """The largest batch that the configuration allows, on this rank of the grid.

    Every sample has ``crop_size`` tokens, ``data.max_atoms`` atoms or 8.2 a token, and as many MSA rows and templates
    as may be. Shapes and dtypes are the schema's.

    Args:
        config: of the run.
        grid: with the rank.
        side: what the sides of a tile are multiples of; see :class:`cpfold_train.data.stream.padding.Padding`.

    Returns:
        Tensors on the meta device, and ``ON_HOST``, the only one whose values matter, as an array.
    """
    b, data = config.batch_size, config.data
    count = ceil(ATOMS_PER_TOKEN * config.crop_size)
    count = min(count, data.max_atoms or count)
    padding = in_buckets(data.buckets, side, config.crop_size, data.max_msa_rows)
    n, s, a = padding.sizes(grid, config.crop_size, data.max_msa_rows, count)
    sizes = {"token": n, "sequence": s, "atom": a, "template": max(1, data.max_templates), **HOMOTETRAMER}
    features = {
        name: torch.empty(b, *feature.shape(sizes, grid), dtype=feature.torch_dtype, device="meta")
        for name, feature in FEATURES.items()
    }
    start = torch.arange(config.crop_size + 1) * count // config.crop_size
    start = torch.cat([start, start[-1:].expand(n - config.crop_size)]).int()
    return features | {ON_HOST: start.expand(b, -1).numpy()}


def feature_bytes(batch: dict[str, Tensor]) -> int:
    """What the features of a batch take on the device."""
    return sum(x.nbytes for name, x in batch.items() if name != ON_HOST)


def batches_of_data(config: TrainConfig, grid: Grid, count: int) -> list[dict[str, Tensor]]:
    """The first batches that a run is trained on, on this rank of the grid.

    Raises:
        DataError: they cannot be read.
    """
    without_workers = replace(config.data, num_workers=0)
    accumulate = config.trainer.accumulate_grad_batches
    nowhere = Path(os.devnull)
    data = TileData(without_workers, config.crop_size, config.batch_size, accumulate, config.seed, nowhere)
    rank = SimpleNamespace(cp=SimpleNamespace(grid=grid), root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=rank, limit_train_batches=1.0)
    batches = islice(iter(data.train_dataloader()), count)
    return [{name: batch[name] for name in FEATURES} for batch in batches]
