"""Triangle multiplication: every pair (i, j) is updated from all pairs (i, k) and (j, k).

AlphaFold 3, Algorithms 12 (outgoing) and 13 (incoming). The contraction over k is independent for each channel. So the
tiles are exchanged for channels: rank p gets all N x N pairs of its c/P channels, does one batched matrix product, and
the result goes back to tiles. The pack into messages is the channel-first permute that the product wants anyway.
Each rank sends 3 T (P - 1) / P elements forward, T = B (N/R) (N/C) c.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import everything, tiles, with_dim
from cpfold_train.parallel.redistribute import finish, start


def triangle_multiplication_outgoing(a: Tensor, b: Tensor, cp: ContextParallel) -> Tensor:
    """``x_ij = sum_k a_ik b_jk`` for each channel.

    Args:
        a, b: tiles (B, N/R, N/C, c), zero where a pair is masked.
        cp: the running grid.

    Returns:
        Tile (B, N/R, N/C, c).
    """
    return _by_channels(a, b, lambda a, b: a @ b.mT, cp)


def triangle_multiplication_incoming(a: Tensor, b: Tensor, cp: ContextParallel) -> Tensor:
    """``x_ij = sum_k a_ki b_kj`` for each channel; otherwise as :func:`triangle_multiplication_outgoing`."""
    return _by_channels(a, b, lambda a, b: a.mT @ b, cp)


def _by_channels(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor], cp: ContextParallel) -> Tensor:
    """Apply a product of two matrices (B, c/P, N, N) to tiles (B, N/R, N/C, c)."""
    n, c = a.shape[1] * cp.grid.rows, a.shape[3]
    as_tiles = with_dim(((0, c),) * cp.all.size, tiles(cp.grid, n, n))
    as_channels = with_dim(split(c, cp.all.size), everything(cp.grid, n, n))

    def move(x: Tensor, has, wants):
        return start(x, cp, cp.all, (1, 2, 3), has, wants, "triangle_multiplication")

    a_coming = move(a.permute(0, 3, 1, 2), as_tiles, as_channels)
    b_coming = move(b.permute(0, 3, 1, 2), as_tiles, as_channels)
    x = product(finish(a_coming), finish(b_coming))
    return finish(move(x, as_channels, as_tiles)).permute(0, 2, 3, 1)
