"""Values of atoms or tokens that are sharded over all ranks, and what every rank needs whole of them."""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.redistribute import redistribute


def gather_shards(x: Tensor, cp: ContextParallel, op: str) -> Tensor:
    """Shards (B, n/P, ...) of all ranks, in order, to (B, n, ...) on every rank.

    For coordinates, masks and indices: what is small even when whole. The gradient of an element is summed over the
    ranks that used it, on the rank that owns it.
    """
    n = x.shape[1] * cp.all.size
    shards = tuple((part,) for part in split(n, cp.all.size))
    return redistribute(x, cp, cp.all, (1,), shards, (((0, n),),) * cp.all.size, op)


def own_shard(x: Tensor, cp: ContextParallel) -> Tensor:
    """This rank's shard (B, n/P, ...) of what every rank has whole, (B, n, ...)."""
    return x[:, slice(*split(x.shape[1], cp.all.size)[cp.all.index])]
