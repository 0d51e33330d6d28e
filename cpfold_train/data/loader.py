"""Stream batches of tiles from shards, the same on any grid and with any number of workers.

What a batch holds is a pure function of (seed, epoch, its number, the replica). Epoch e visits positions 0, 1, 2, ...;
position p shows sample ``p mod M`` of pass ``p div M`` over the M samples, each pass in its own keyed order. Replica d
of dp takes positions d, d + dp, d + 2 dp, ... and all ranks of its grid take the same ones. The number of positions is
rounded up to fill a batch on every replica, by going on into the next pass, so that all replicas have equally many
batches and no sample is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from cpfold_train.data.batch import Augmentation, Crop, collate, make_crop
from cpfold_train.data.crop import CROPS
from cpfold_train.data.shards import Entry, open_shards, read_sample
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import numpy_generator

Draw = tuple[Entry, tuple[int, int, int]]
"""A sample and what its random choices are keyed by: (seed, epoch, position)."""


class TileLoader:
    """Iterates over the batches of one epoch: dicts of this rank's tensors, with the batch dim first.

    Args:
        shards: globs of .tar files.
        grid: this rank's place.
        seed: of order, crops and MSA rows.
        crop_size: most tokens of a sample.
        max_msa_rows: most MSA rows of a sample.
        batch_size: samples a batch and replica.
        num_workers: processes that prepare batches, 0 for none.
        shuffle: draw another order, other crops and other rows in each epoch; without it every epoch is the same.
        crop: ``spatial`` or ``contiguous``.
        interface: probability that a spatial crop is centred on an interface.
        max_templates: most templates of a sample.
        augmentation: what else is drawn.
        samples_per_epoch: positions of an epoch over all replicas; by default the number of samples.
        pin_memory: put batches in page-locked memory, for faster copies to a GPU.
        prefetch_factor: batches that each worker prepares ahead.
        start_method: how workers start, ``fork``, ``spawn`` or ``forkserver``; the platform's default if None.

    Iterating again begins the next epoch, also where the last one was left early. ``state_dict`` taken between two
    batches resumes exactly there, also on another grid or with another number of workers or replicas.
    """

    def __init__(
        self,
        shards: list[str],
        grid: Grid,
        *,
        seed: int = 0,
        crop_size: int = 256,
        max_msa_rows: int = 256,
        batch_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        crop: str = "spatial",
        interface: float = 0.5,
        max_templates: int = 4,
        augmentation: Augmentation = Augmentation(),  # noqa: B008, it is frozen
        samples_per_epoch: int | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        start_method: str | None = None,
    ) -> None:
        self.entries = open_shards(list(shards))
        samples = len(self.entries) if samples_per_epoch is None else samples_per_epoch
        if min(crop_size, max_msa_rows, batch_size, samples) < 1 or num_workers < 0:
            raise ConfigError("crop_size, max_msa_rows, batch_size and samples_per_epoch start at 1, num_workers at 0")
        if crop not in CROPS:
            raise ConfigError(f"crop={crop} is not known: type crop={' or crop='.join(CROPS)}")
        self.grid, self.seed, self.batch_size, self.shuffle = grid, seed, batch_size, shuffle
        self.num_workers, self.start_method, self.pin_memory = num_workers, start_method, pin_memory
        self.prefetch_factor = prefetch_factor
        self.make = partial(
            _crop,
            crop_size=crop_size,
            max_msa_rows=max_msa_rows,
            max_templates=max_templates,
            crop=crop,
            interface=interface,
            augmentation=augmentation,
        )
        self.samples = samples
        self.batches = -(-samples // (grid.dp * batch_size))
        self.epoch = 0
        self.position = 0
        """Batch of the epoch that comes next."""
        self.resumed = False

    def __len__(self) -> int:
        """Batches of an epoch, equal on all replicas."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; no effect while in it, so that a resumed one is not lost."""
        if epoch != self.epoch:
            self.epoch, self.position, self.resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Epoch, and position of the next sample over all replicas."""
        return {"epoch": self.epoch, "position": self.position * self.batch_size * self.grid.dp}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue where :meth:`state_dict` was taken; samples before it are not read."""
        self.epoch = state["epoch"]
        self.position = state["position"] // (self.batch_size * self.grid.dp)
        self.resumed = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.position >= self.batches or (self.position and not self.resumed):
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        dataset = wds.DataPipeline(
            partial(
                _draws,
                self.entries,
                self.grid,
                seed=self.seed,
                epoch=self.epoch,
                shuffle=self.shuffle,
                batch_size=self.batch_size,
                start=self.position,
                stop=self.batches,
            ),
            partial(_batches, make=self.make, grid=self.grid, samples=self.samples),
        )
        workers = {"multiprocessing_context": self.start_method, "prefetch_factor": self.prefetch_factor}
        loader = wds.WebLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            **(workers if self.num_workers else {}),
        )
        for batch in loader:
            self.position += 1
            yield batch


@lru_cache(maxsize=8)
def _order(samples: int, seed: int, epoch: int, number: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch, number).permutation(samples)


def _draws(
    entries: list[Entry], grid: Grid, seed: int, epoch: int, shuffle: bool, batch_size: int, start: int, stop: int
) -> Iterator[list[Draw]]:
    """First stage: the draws of each batch that this worker prepares, start + w, start + w + W, ...

    The DataLoader takes batches from its workers in turn, so the batches come out in order.
    """
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    epoch = epoch if shuffle else 0
    for batch in range(start + first, stop, step):
        draws = []
        for slot in range(batch * batch_size, (batch + 1) * batch_size):
            position = slot * grid.dp + grid.dp_index
            number, place = divmod(position, len(entries))
            sample = int(_order(len(entries), seed, epoch, number)[place]) if shuffle else place
            draws.append((entries[sample], (seed, epoch, position)))
        yield draws


def _crop(draw: Draw, **settings: Any) -> Crop:
    entry, key = draw
    return make_crop(*read_sample(entry), draw=key, **settings)


def _batches(source: Iterable[list[Draw]], make: partial, grid: Grid, samples: int) -> Iterator[dict[str, Any]]:
    """Second stage: read, crop, tile and stack. ``filler`` (B,) marks samples that only fill the epoch's last batch."""
    for draws in source:
        filler = torch.tensor([position >= samples for _, (_, _, position) in draws])
        yield {**collate([make(draw) for draw in draws], grid), "filler": filler}
