"""Transposing the pair representation: rank (I, J) fetches the tiles that mirror its own."""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import mirrored_tiles, tiles
from cpfold_train.parallel.redistribute import redistribute


def transpose(z: Tensor, cp: ContextParallel) -> Tensor:
    """``z_ji`` as a tile (B, N/R, N/C, c), from the tile of ``z_ij`` (B, N/R, N/C, c). Sends about T elements."""
    n = z.shape[1] * cp.grid.rows
    mirrored = redistribute(z, cp, cp.all, (1, 2), tiles(cp.grid, n, n), mirrored_tiles(cp.grid, n), "transpose")
    return mirrored.transpose(1, 2)
