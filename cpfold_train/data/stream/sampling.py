"""Which sample stands at which position of the training stream, and what of it the crop is to show.

Everything is a pure function of (seed, epoch, position). An epoch has ``samples`` positions, and the positions past its
end, which fill up the last batches, are the first ones of the next epoch. Of several data sets each position draws one,
by their weights. A set that shows ``each`` sample goes through its samples in its own order, pass after pass and across
epochs, and none comes again before all have come. A ``weighted`` set draws a chain or an interface for each position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from cpfold_train.data.stream.crop import SPATIAL, Focus
from cpfold_train.data.stream.shards import SampleLocation, location_of, read_indices
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.random import numpy_generator
from cpfold_train.vocabulary import NONPOLYMER

SAMPLINGS = ("each", "weighted")

ALPHA_POLYMER, ALPHA_LIGAND = 3.0, 1.0
BETA_CHAIN, BETA_INTERFACE = 0.5, 1.0
"""AlphaFold 3, supplement 2.5.1: alpha of a chain (proteins and nucleic acids alike), beta of what is drawn."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        shards: globs of .tar files.
        weight: how often it is drawn from, relative to the other sets.
        sampling: one of ``SAMPLINGS``.
        crop: relative probability of each kind of crop.
    """

    shards: Sequence[str]
    weight: float = 1.0
    sampling: str = "each"
    crop: Mapping[str, float] = field(default_factory=lambda: SPATIAL)


class Targets(NamedTuple):
    """The T chains and interfaces that a weighted set draws from.

    Attributes:
        sample: (T,) sample of each.
        chains: (T, 2) its chain, and -1; or the two chains of an interface.
        cumulative: (T,) running sum of the weights.
    """

    sample: np.ndarray
    chains: np.ndarray
    cumulative: np.ndarray


class Pool(NamedTuple):
    """An opened data set.

    Attributes:
        shards: path of each tar, and of its index what finds a sample.
        first: number of each tar's first sample, and of all samples.
        targets: None if each sample is shown.
    """

    shards: list[tuple[str, dict[str, np.ndarray]]]
    first: np.ndarray
    targets: Targets | None
    source: Source


class Draw(NamedTuple):
    """A sample, what its crop is to show, and the kinds of crop."""

    location: SampleLocation
    focus: Focus
    crop: Mapping[str, float]


def open_source(source: Source) -> Pool:
    """Read the indices of a set's shards.

    Raises:
        ConfigError: a glob matches nothing, or there is no chain to draw.
        DataError: a tar is not a shard.
    """
    indices = read_indices(source.shards)
    first = np.cumsum([0] + [len(index["key"]) for _, index in indices])
    targets = weigh([index for _, index in indices]) if source.sampling == "weighted" else None
    if targets is not None and not len(targets.sample):
        raise ConfigError(f"no chain in {', '.join(source.shards)} has coordinates: type data.sampling=each")
    columns = ("key", "offset", "size")
    return Pool([(tar, {name: index[name] for name in columns}) for tar, index in indices], first, targets, source)


def weigh(indices: Sequence[dict[str, np.ndarray]]) -> Targets:
    """Weights of all observed chains and of the interfaces between them.

    w = beta / cluster_size * (3 n_protein + 3 n_nucleic + 1 n_ligand), where the cluster of an interface is the pair of
    its chains' clusters, and a cluster is as large as it has members among the chains or the interfaces (AlphaFold 3,
    supplement 2.5.1).
    """
    names = np.unique(np.concatenate([index["cluster"] for index in indices]))
    samples, chains = 0, 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("of", "chain", "alpha", "cluster", "seen", "pair")}
    for index in indices:
        start = index["chain_start"]
        count = np.diff(start)
        columns["of"].append(samples + np.repeat(np.arange(len(count)), count))
        columns["chain"].append(np.arange(start[-1]) - np.repeat(start[:-1], count))
        columns["alpha"].append(np.where(index["chain_type"] == NONPOLYMER, ALPHA_LIGAND, ALPHA_POLYMER))
        columns["cluster"].append(np.searchsorted(names, index["cluster"])[index["chain_cluster"]])
        columns["seen"].append(index["chain_observed"] > 0)
        columns["pair"].append(
            chains + index["interface"] + np.repeat(start[:-1], np.diff(index["interface_start"]))[:, None]
        )
        samples, chains = samples + len(count), chains + int(start[-1])
    of, chain, alpha, cluster, seen, pair = (np.concatenate(column) for column in columns.values())
    pair = pair[seen[pair].all(axis=1)]
    single = np.flatnonzero(seen)
    low, high = np.sort(cluster[pair], axis=1).T
    weight = np.concatenate(
        [
            BETA_CHAIN * alpha[single] / _cluster_size(cluster[single]),
            BETA_INTERFACE * alpha[pair].sum(axis=1) / _cluster_size(low * len(names) + high),
        ]
    )
    shown = np.concatenate([np.stack([chain[single], np.full(len(single), -1)], axis=1), chain[pair]])
    return Targets(of[np.concatenate([single, pair[:, 0]])], shown, np.cumsum(weight))


def _cluster_size(cluster: np.ndarray) -> np.ndarray:
    """How many members the cluster of each has."""
    _, number, count = np.unique(cluster, return_inverse=True, return_counts=True)
    return count[number]


@dataclass(frozen=True)
class Stream:
    """The training stream.

    Attributes:
        pools: one for each data set.
        samples: positions of an epoch.
        seed: of all draws.
        shuffle: False shows the samples of the first set in the order of the shards, the same in each epoch.
    """

    pools: Sequence[Pool]
    samples: int
    seed: int
    shuffle: bool

    def order(self) -> str:
        """The same of streams that have the same samples, by id, at the same positions; wherever their shards lie, and
        into however many the samples are divided."""
        total = sum(pool.source.weight for pool in self.pools)
        digest = blake2b(repr((self.samples, self.seed, self.shuffle)).encode(), digest_size=8)
        for pool in self.pools:
            digest.update(repr((pool.source.weight / total, pool.source.sampling)).encode())
            for _, index in pool.shards:
                digest.update("\n".join([*index["key"].tolist(), ""]).encode())
            if pool.targets is not None:
                for column in pool.targets:
                    digest.update(column.tobytes())
        return digest.hexdigest()

    def draw(self, epoch: int, position: int, attempt: int = 0) -> Draw:
        """What stands at a position. ``attempt`` counts the samples drawn for it before, which could not be used."""
        if not self.shuffle:
            pool = self.pools[0]
            return Draw(_sample(pool, (position + attempt) % pool.first[-1]), (), pool.source.crop)
        later, turn = divmod(position, self.samples)
        weights = tuple(pool.source.weight for pool in self.pools)
        chosen, turns = _turns(weights, self.samples, self.seed, epoch + later)
        number = int(chosen[turn])
        pool = self.pools[number]
        rng = numpy_generator(self.seed, "sample", epoch, position, attempt)
        if pool.targets is not None:
            cumulative = pool.targets.cumulative
            target = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
            focus = tuple(chain for chain in pool.targets.chains[target].tolist() if chain >= 0)
            return Draw(_sample(pool, pool.targets.sample[target]), focus, pool.source.crop)
        if attempt:
            return Draw(_sample(pool, rng.integers(pool.first[-1])), (), pool.source.crop)
        lap, turn = divmod(int(turns[turn]), int(pool.first[-1]))
        return Draw(_sample(pool, _order(int(pool.first[-1]), self.seed, number, lap)[turn]), (), pool.source.crop)


def _sample(pool: Pool, sample: int) -> SampleLocation:
    shard = int(np.searchsorted(pool.first, sample, side="right")) - 1
    return location_of(*pool.shards[shard], int(sample - pool.first[shard]))


@lru_cache(maxsize=8)
def _order(samples: int, seed: int, pool: int, lap: int) -> np.ndarray:
    return numpy_generator(seed, "order", pool, lap).permutation(samples)


@lru_cache(maxsize=4)
def _turns(weights: tuple[float, ...], samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) which set each position of the epoch draws, and how many draws of this set came before, ever."""
    chosen = _choices(weights, samples, seed, epoch)
    turns = np.zeros(samples, dtype=np.int64)
    before = _drawn_before(weights, samples, seed, epoch)
    for pool in range(len(weights)):
        mine = np.flatnonzero(chosen == pool)
        turns[mine] = np.arange(len(mine)) + before[pool]
    return chosen, turns


@lru_cache(maxsize=128)
def _drawn_before(weights: tuple[float, ...], samples: int, seed: int, epoch: int) -> np.ndarray:
    """How many draws of each set the epochs before this one had.

    By blocks of epochs, each twice as long as the next, so that a late epoch does not count all earlier ones again.
    """
    if not epoch:
        return np.zeros(len(weights), dtype=np.int64)
    # The epoch without its lowest bit: what came before that is known from other epochs.
    start = epoch & (epoch - 1)
    block = (np.bincount(_choices(weights, samples, seed, e), minlength=len(weights)) for e in range(start, epoch))
    return _drawn_before(weights, samples, seed, start) + sum(block)


def _choices(weights: tuple[float, ...], samples: int, seed: int, epoch: int) -> np.ndarray:
    """(samples,) the set that each position of the epoch draws."""
    if len(weights) == 1:
        return np.zeros(samples, dtype=np.int64)
    bounds = np.cumsum(weights) / np.cumsum(weights)[-1]
    return np.searchsorted(bounds, numpy_generator(seed, "set", epoch).random(samples), side="right")
