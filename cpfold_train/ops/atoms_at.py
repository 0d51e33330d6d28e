"""Coordinates of a few chosen atoms of every token, on all ranks."""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce

OP = "atoms_at"


def atoms_at(x: Tensor, index: Tensor, cp: ContextParallel) -> Tensor:
    """Values of atoms by their global indices, wherever they lie. Sends about 2 n c elements.

    Args:
        x: atom shard (B, A/P, c).
        index: (B, n) atoms 0 ... A - 1, the same on all ranks.
        cp: the running grid.

    Returns:
        (B, n, c), the same on all ranks.
    """
    size = x.shape[1]
    own = index.long() - cp.all.index * size
    mine = (own >= 0) & (own < size)
    picked = x.gather(1, own.clamp(0, size - 1)[..., None].expand(-1, -1, x.shape[2]))
    return all_reduce(picked.masked_fill(~mine[..., None], 0), cp, cp.all, OP)
