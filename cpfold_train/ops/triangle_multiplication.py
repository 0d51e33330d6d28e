"""Triangle multiplication: every pair (i, j) is updated from all pairs (i, k) and (j, k).

AlphaFold 3, Algorithms 12 (outgoing) and 13 (incoming). The contraction over k is independent for each channel. So the
tiles are exchanged for channels: rank p gets all N x N pairs of its c/P channels, does one batched matrix product, and
the result goes back to tiles. The projections produce channels first, which is what messages and product both want.
Each rank sends 3 T (P - 1) / P elements forward, T = B (N/R) (N/C) c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from cpfold_train.ops.by_rows import by_rows, rows_per_block
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import everything, tiles, with_dim
from cpfold_train.parallel.redistribute import Layout, Pending, finish, start


class Weights(NamedTuple):
    """Parameters: (c,) of the norms, (2c, c) of ``p_in`` and ``g_in``, (c, c) of ``p_out`` and ``g_out``."""

    norm_in_weight: Tensor
    norm_in_bias: Tensor
    p_in: Tensor
    g_in: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor


def triangle_multiplication_outgoing(z: Tensor, pair_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """``gate_ij W norm(sum_k a_ik b_jk)``, with a and b gated projections of z.

    Args:
        z: tile (B, N/R, N/C, c).
        pair_mask: tile (B, N/R, N/C).
        w: parameters.
        cp: the running grid.

    Returns:
        Update of the tile (B, N/R, N/C, c).
    """
    return _update(z, pair_mask, w, lambda a, b: a @ b.mT, cp)


def triangle_multiplication_incoming(z: Tensor, pair_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """``gate_ij W norm(sum_k a_ki b_kj)``; otherwise as :func:`triangle_multiplication_outgoing`."""
    return _update(z, pair_mask, w, lambda a, b: a.mT @ b, cp)


def _update(
    z: Tensor, pair_mask: Tensor, w: Weights, product: Callable[[Tensor, Tensor], Tensor], cp: ContextParallel
) -> Tensor:
    n, c = z.shape[1] * cp.grid.rows, z.shape[3]
    as_tiles = with_dim(((0, c),) * cp.all.size, tiles(cp.grid, n, n))
    as_channels = with_dim(split(c, cp.all.size), everything(cp.grid, n, n))

    def move(x: Tensor, has: Layout, wants: Layout) -> Pending:
        return start(x, cp, cp.all, (1, 2, 3), has, wants, "triangle_multiplication")

    rows = rows_per_block(z.shape[0] * z.shape[2] * 4 * c * z.element_size(), z.device)
    a_and_b = by_rows(_project, rows, (z, pair_mask), (w.norm_in_weight, w.norm_in_bias, w.p_in, w.g_in), dim=2)
    a, b = (move(x, as_tiles, as_channels) for x in a_and_b.chunk(2, 1))
    x = finish(move(product(finish(a), finish(b)), as_channels, as_tiles))
    shared = w.norm_in_weight, w.norm_in_bias, w.norm_out_weight, w.norm_out_bias, w.p_out, w.g_out
    return by_rows(_gated_output, rows, (x.permute(0, 2, 3, 1), z), shared)


def _project(z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, p_in: Tensor, g_in: Tensor) -> Tensor:
    """Rows (B, r, N/C, c) to a and b in one, channels first (B, 2c, r, N/C)."""
    x = layer_norm(z, norm_weight.shape, norm_weight, norm_bias)
    p, g = (torch.cat([p_in, g_in]) @ x.flatten(1, 2).mT).unflatten(2, z.shape[1:3]).chunk(2, 1)
    return p * g.sigmoid() * mask[:, None].to(p.dtype)


def _gated_output(
    x: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    p_out: Tensor,
    g_out: Tensor,
) -> Tensor:
    """Rows of the product and of z, (B, r, N/C, c), to rows of the update."""
    x = layer_norm(x.contiguous(), norm_out_weight.shape, norm_out_weight, norm_out_bias)
    z = layer_norm(z, norm_in_weight.shape, norm_in_weight, norm_in_bias)
    return linear(x, p_out) * linear(z, g_out).sigmoid()
