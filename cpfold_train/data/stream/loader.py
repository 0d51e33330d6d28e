"""Stream batches of tiles from shards, the same on any grid and with any number of workers.

What a batch holds is a pure function of (seed, epoch, its number, the replica). Epoch e visits positions 0, 1, 2, ...
of the stream (``sampling.py``). Replica d of dp takes positions d, d + dp, d + 2 dp, ... and all ranks of its grid take
the same ones. The number of positions is rounded up to fill a batch on every replica, so that all replicas have equally
many batches and no sample is left out.

A sample that cannot be used is replaced by the next attempt at its position. All ranks of a replica read the same bytes
and check the whole sample, so they replace alike without asking each other.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import get_worker_info

from cpfold_train.data.stream.batch import Augmentation, Crop, collate, make_crop
from cpfold_train.data.stream.padding import in_buckets
from cpfold_train.data.stream.quarantine import note
from cpfold_train.data.stream.sampling import Source, Stream, open_source
from cpfold_train.data.stream.shards import read_sample
from cpfold_train.data.stream.transfer import PackedTensors, pack, unpack
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import CORRECTED

NO_AUGMENTATION = Augmentation()

MOST_ATTEMPTS = 64
"""Samples in a row that may be unusable: a data set of which nothing can be read is told at once."""

PackedBatch = tuple[tuple[Tensor, PackedTensors, dict[str, Any]] | None, list[str]]
"""A packed batch, and why samples could not be used; None where more were bad than an epoch, or one position in it,
may have."""


class StreamPosition(NamedTuple):
    """Where in the stream a batch is.

    Attributes:
        epoch: its epoch.
        batch: its number in the epoch.
        first: batch that the epoch begins with here: 0, or the one at which a run has resumed.
        offset: positions by which the epoch's batches lie after those of a whole epoch: 0, or what is left where a run
            resumes between two of its batches.
        steps: optimizer steps before the batch ``first``.
    """

    epoch: int
    batch: int
    first: int
    offset: int
    steps: int


class BatchSpec(NamedTuple):
    """A batch before it is made: its epoch, its positions, and the most tokens of a sample."""

    epoch: int
    positions: list[int]
    crop_size: int


@dataclass(frozen=True)
class SampleSpec:
    """How samples are made, beside what a :class:`BatchSpec` says; see :class:`TileLoader`."""

    stream: Stream
    grid: Grid
    settings: dict[str, Any]
    max_bad: int
    quarantine: Path | None
    side: int
    buckets: int | None


class TileLoader:
    """Iterates over the batches of one epoch: dicts of this rank's tensors, with the batch dim first.

    Args:
        sources: data sets.
        grid: of this rank.
        seed: of order, crops and all other draws.
        crop_size: most tokens of a sample.
        crop_schedule: other sizes of crops, each from an optimizer step on.
        accumulate: batches of an optimizer step.
        max_atoms: most atoms of a sample, None for no limit.
        max_msa_rows: most MSA rows of a sample.
        max_templates: most templates of a sample.
        augmentation: what else is drawn.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
        batch_size: samples a batch and replica.
        num_workers: processes that prepare batches, 0 for none.
        shuffle: draw other samples and crops in each epoch; without it every epoch is the same.
        samples_per_epoch: positions of an epoch over all replicas; by default the number of samples.
        limit: batches of an epoch that are made, or the fraction of them, as Lightning's ``limit_train_batches``.
        side: tokens along each side of a tile are padded to a multiple of this.
        buckets: numbers of tokens and MSA rows that samples are padded to; None pads no more than needed.
        max_bad_share: fraction of an epoch's samples that may be unusable before iterating raises DataError.
        quarantine: file that receives the samples which could not be used.
        pin_memory: put batches in page-locked memory, for faster copies to a GPU.
        prefetch_factor: batches that each worker prepares ahead.
        start_method: how workers start, ``fork``, ``spawn`` or ``forkserver``; the platform's default if None.

    Iterating again begins the next epoch, also where the last one was left early. ``state_dict`` taken between two
    optimizer steps resumes exactly there, also on another grid, and with other workers, replicas, batches or steps: the
    position is counted in samples. Taken within a step it resumes at the start of the step, whose gradient is in no
    checkpoint. Workers live on from one epoch to the next and prepare its first batches while the last ones are used.

    Attributes:
        batches: of an epoch that are made.
        epoch: from 0 on.
        position: batch of the epoch that comes next. In an epoch that was resumed batches are counted such that the
            last one has the number that it has in other epochs.
        first: batch with which the epoch begins here, from which steps are counted.
        resumed: whether the next iteration goes on within an epoch.
        told: where a resumed run goes on; empty where none has resumed.
        waited_s: seconds spent waiting for batches since the start.
        quarantined: samples of this replica that could not be used since the start.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        grid: Grid,
        *,
        seed: int = 0,
        crop_size: int = 256,
        crop_schedule: Mapping[int, int] | None = None,
        accumulate: int = 1,
        max_atoms: int | None = None,
        max_msa_rows: int = 256,
        max_templates: int = 4,
        augmentation: Augmentation = NO_AUGMENTATION,
        features: str = CORRECTED,
        batch_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        samples_per_epoch: int | None = None,
        limit: int | float = 1.0,
        side: int = 1,
        buckets: int | None = None,
        max_bad_share: float = 0.05,
        quarantine: Path | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        start_method: str | None = None,
    ) -> None:
        pools = tuple(open_source(source) for source in sources)
        samples = sum(int(pool.first[-1]) for pool in pools) if samples_per_epoch is None else samples_per_epoch
        if min(crop_size, max_msa_rows, batch_size, samples) < 1 or num_workers < 0:
            raise ConfigError("crop_size, max_msa_rows, batch_size and samples_per_epoch start at 1, num_workers at 0")
        self.grid, self.batch_size, self.max_bad_share, self.accumulate = grid, batch_size, max_bad_share, accumulate
        self._all_batches = -(-samples // (grid.dp * batch_size))
        part = limit if isinstance(limit, int) else int(self._all_batches * limit)
        self.batches = max(1, min(part, self._all_batches))
        self.sizes = {0: crop_size, **(crop_schedule or {})}
        settings = {"max_atoms": max_atoms, "max_msa_rows": max_msa_rows, "max_templates": max_templates}
        settings |= {"augmentation": augmentation, "features": features}
        max_bad = int(max_bad_share * self._all_batches * batch_size)
        stream = Stream(pools, samples, seed, shuffle)
        self._sample_spec = SampleSpec(stream, grid, settings, max_bad, quarantine, side, buckets)
        self._workers = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            self._workers |= {"multiprocessing_context": start_method, "prefetch_factor": prefetch_factor}
            self._workers["worker_init_fn"] = _obey_own_rank_only
        self.epoch, self.position, self.first = 0, 0, 0
        self.resumed, self.told = False, ""
        self.waited_s, self.quarantined = 0.0, 0
        self._offset, self._steps_before = 0, 0
        self._bad_in_epoch = 0
        self._packed: Iterator[PackedBatch] | None = None
        self._prepared_for: StreamPosition | None = None
        """What ``_packed`` gives next."""

    def __len__(self) -> int:
        """Batches of an epoch, equal on all replicas, without a limit."""
        return self._all_batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; no effect while in it, so that a resumed one is not lost."""
        if epoch != self.epoch:
            self._begin(epoch)

    def state_dict(self) -> dict[str, int | str]:
        """Epoch, samples of it over all replicas that are in whole steps, the optimizer steps made so far, and what
        tells whether another loader has the same samples in the same order."""
        order = self._sample_spec.stream.order()
        common = {"samples": self._sample_spec.stream.samples, "order": order}
        if self.position == self.batches:
            return {"epoch": self.epoch + 1, "position": 0, "step": self._steps_at(self.position)} | common
        within = (self.position - self.first) % self.accumulate
        position = (self.position - within) * self._samples_at_once + self._offset
        return {"epoch": self.epoch, "position": position, "step": self._steps_at(self.position - within)} | common

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Let the next iteration continue where :meth:`state_dict` was taken; samples before it are not read.

        With other replicas or batches they are made of the samples that are left. Where the samples or their order are
        others, what is left of the epoch is not defined, and the next one begins; so it does where ``limit`` says that
        the epoch has ended before.
        """
        stream, at_once = self._sample_spec.stream, self._samples_at_once
        position, then = state["position"], state.get("samples", stream.samples)
        self._begin(state["epoch"])
        self._steps_before = state["step"]
        self.resumed = True
        lost = max(0, then - position)
        begins = f"epoch {self.epoch + 1} begins, and {lost} of {then} samples of epoch {self.epoch} are not shown"
        left = -(-(min(stream.samples, self.batches * at_once) - position) // at_once)
        if not position:
            self.told = f"epoch {self.epoch} begins"
        elif state.get("order", stream.order()) != stream.order():
            self.epoch += 1
            self.told = f"the samples or their order are others than in the checkpoint: {begins}"
        elif left <= 0:
            self.epoch += 1
            self.told = f"no batches of the epoch are left: {begins}"
        else:
            self.first = self.position = self.batches - left
            self._offset = position - self.first * at_once
            self.told = f"epoch {self.epoch} goes on with sample {position + 1} of {stream.samples}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.position >= self.batches or (self.position and not self.resumed):
            self._begin(self.epoch + 1)
        self.resumed = False
        while self.position < self.batches:
            batch = self._next()
            self.position += 1
            yield batch

    def _begin(self, epoch: int) -> None:
        self._steps_before = self._steps_at(self.position)
        self.epoch, self.position, self.first, self._offset = epoch, 0, 0, 0
        self.resumed, self._bad_in_epoch = False, 0

    @property
    def _samples_at_once(self) -> int:
        """Samples of a batch, of all replicas."""
        return self.batch_size * self.grid.dp

    def _steps_at(self, batch: int) -> int:
        """Optimizer steps before a batch; Lightning makes one of what has been accumulated when an epoch ends."""
        return self._steps_before - (self.first - batch) // self.accumulate

    def _stream_position(self) -> StreamPosition:
        return StreamPosition(self.epoch, self.position, self.first, self._offset, self._steps_before)

    def _next(self) -> dict[str, Any]:
        began = time.perf_counter()
        if self._prepared_for != self._stream_position():
            self._packed = self._prepare()
        self._prepared_for = None
        packed, reasons = next(self._packed)
        self.waited_s += time.perf_counter() - began
        self.quarantined += len(reasons)
        self._bad_in_epoch += len(reasons)
        if packed is None or self._bad_in_epoch > self._sample_spec.max_bad:
            raise DataError(
                f"{self._bad_in_epoch} of the {self._all_batches * self.batch_size} samples of an epoch could not be "
                f"used, the last because {reasons[-1]}: make the shards again with python -m cpfold_train prepare, or "
                f"type a larger data.max_bad_share than {self.max_bad_share}"
            )
        if self.position + 1 < self.batches:
            self._prepared_for = self._stream_position()._replace(batch=self.position + 1)
        else:
            self._prepared_for = StreamPosition(self.epoch + 1, 0, 0, 0, self._steps_at(self.batches))
        return unpack(*packed)

    def _prepare(self) -> Iterator[PackedBatch]:
        """Start to prepare batches from here on, without an end."""
        grid, sizes = self.grid, self.sizes
        counts = self.batches, self.batch_size, self.accumulate
        batch_specs = partial(_batch_specs, self._stream_position(), *counts, sizes, grid.dp, grid.dp_index)
        pipeline = wds.DataPipeline(batch_specs, partial(_batches, sample_spec=self._sample_spec))
        return iter(wds.WebLoader(pipeline, batch_size=None, **self._workers))


def _obey_own_rank_only(worker: int) -> None:
    """Let SIGTERM end this worker only where it comes from the rank that started it.

    A scheduler sends it to all processes of a job; the rank needs its workers for the step after which it saves.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True, name="sigterm").start()


def crop_size_at(sizes: Mapping[int, int], step: int) -> int:
    """Most tokens of a sample in an optimizer step. ``sizes`` are those from a step on, the first of them from 0."""
    return sizes[max(start for start in sizes if start <= step)]


def _batch_specs(
    start: StreamPosition,
    batches: int,
    batch_size: int,
    accumulate: int,
    sizes: Mapping[int, int],
    dp: int,
    dp_index: int,
) -> Iterator[BatchSpec]:
    """First stage: the batches that this worker prepares, every W-th from the start on and into the next epochs.

    The DataLoader takes batches from its workers in turn, so the batches come out in order.
    """
    worker = get_worker_info()
    first, every = (worker.id, worker.num_workers) if worker else (0, 1)
    steps_of_first = -(-(batches - start.first) // accumulate)
    for number in itertools.count(start.batch + first, every):
        later, batch = divmod(number, batches)
        if later:
            offset = 0
            step = start.steps + steps_of_first + (later - 1) * -(-batches // accumulate) + batch // accumulate
        else:
            offset, step = start.offset, start.steps + (batch - start.first) // accumulate
        own = range(batch * batch_size, (batch + 1) * batch_size)
        positions = [offset + index * dp + dp_index for index in own]
        yield BatchSpec(start.epoch + later, positions, crop_size_at(sizes, step))


def _batches(batch_specs: Iterable[BatchSpec], sample_spec: SampleSpec) -> Iterator[PackedBatch]:
    """Second stage. A batch's arrays are let go before the next one is made: they would be in memory twice."""
    for batch_spec in batch_specs:
        yield make_batch(sample_spec, batch_spec)


def make_batch(sample_spec: SampleSpec, batch_spec: BatchSpec) -> PackedBatch:
    """Read, crop, tile and stack; and say which samples could not be used and why.

    ``filler`` (B,) marks samples that a mean over the epoch must not count: those that fill up the last batch, and
    those that stand in for another.
    """
    crops, filler, bad = [], [], []
    for position in batch_spec.positions:
        reasons, crop = make_sample(sample_spec, batch_spec, position)
        crops.append(crop)
        filler.append(position >= sample_spec.stream.samples or bool(reasons))
        bad += reasons
    if None in crops:
        return None, bad
    padding = in_buckets(
        sample_spec.buckets, sample_spec.side, batch_spec.crop_size, sample_spec.settings["max_msa_rows"]
    )
    batch = collate(crops, sample_spec.grid, padding)
    return pack({**batch, "filler": torch.tensor(filler), "crop_size": batch_spec.crop_size}), bad


def make_sample(sample_spec: SampleSpec, batch_spec: BatchSpec, position: int) -> tuple[list[str], Crop | None]:
    """The crop at a position of the stream, and why samples drawn before it could not be used."""
    stream, grid, reasons = sample_spec.stream, sample_spec.grid, []
    # Without shuffling, every epoch is the first.
    epoch = batch_spec.epoch if stream.shuffle else 0
    while len(reasons) <= min(sample_spec.max_bad, MOST_ATTEMPTS - 1):
        location, focus, crop = stream.draw(epoch, position, len(reasons))
        try:
            sample = read_sample(location)
            draw = (stream.seed, epoch, position)
            settings = sample_spec.settings | {"crop_size": batch_spec.crop_size, "crop": crop, "focus": focus}
            made = make_crop(*sample, draw=draw, **settings)
            if not made.structure.resolved[made.atoms.atom].any():
                # It would make a step without a gradient.
                raise DataError(
                    f"{made.structure.meta['id']}: no atom of a crop of {len(made.tokens)} tokens is resolved"
                )
            return reasons, made
        except DataError as error:
            reasons.append(str(error))
            if sample_spec.quarantine is not None and grid.cp_index == 0:
                note(sample_spec.quarantine, location, str(error), batch_spec.epoch, position, grid.rank)
    return reasons, None
