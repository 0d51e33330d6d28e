"""Transposing the pair representation: rank (I, J) receives the tiles that are its own on the transposed grid."""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import tiles
from cpfold_train.parallel.redistribute import redistribute


def transpose(z: Tensor, cp: ContextParallel) -> Tensor:
    """``z_ji`` as a tile (B, N/R, N/C, c), from the tile of ``z_ij`` (B, N/R, N/C, c). Sends about T elements."""
    n = z.shape[1] * cp.grid.rows
    # Rank (I, J) receives the rows J and the columns I, which are its own tile when they are transposed.
    has, wants = tiles(cp.grid, n, n), tiles(cp.grid.transposed(), n, n)
    return redistribute(z, cp, cp.all, (1, 2), has, wants, "transpose").transpose(1, 2)
