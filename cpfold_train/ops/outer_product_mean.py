"""Outer product mean: what the columns i and j of the MSA say together about the pair (i, j).

AlphaFold 3, Algorithm 9. Rank (I, J) needs its pair tile's rows of ``a`` and its columns of ``b``, of all sequences;
both are fetched from where they lie, about S N c (1/R + 1/C) elements, some sequences at a time, and the products are
local.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.linear import linear
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import all_rows_of_tile_cols, all_rows_of_tile_rows, col_parts, row_parts, tiles
from cpfold_train.parallel.redistribute import Pending, Route, finish, start

OP = "outer_product_mean"
SEQUENCES = 1024
"""How many sequences to fetch at a time: enough that the projection of every part's c * c channels costs little."""


def outer_product_mean(
    a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor, cp: ContextParallel
) -> Tensor:
    """``z_ij = W vec(sum_s a_si b_sj^T / count_ij) + bias``.

    Args:
        a, b: MSA blocks (B, S/R, N/C, c), zero where the MSA is masked.
        count: tile (B, N/R, N/C), from :func:`pair_counts`.
        weight: (c_z, c * c).
        bias: (c_z,).
        cp: the running grid.

    Returns:
        Tile (B, N/R, N/C, c_z).
    """
    s, n = a.shape[1] * cp.grid.rows, a.shape[2] * cp.grid.cols
    has = tiles(cp.grid, s, n)
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    routes = []
    for depth in split(s, -(-s // SEQUENCES)):
        wants = (tuple((depth, tokens) for tokens in parts) for parts in (rows, cols))
        routes.append([Route(cp, cp.all, (1, 2), has, boxes, OP) for boxes in wants])

    def step(_: int, count: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        at_once = rows_per_block(b[:, 0].numel() * b.shape[3] * b.element_size(), b.device)
        return by_rows(_mean_rows, at_once, (a.permute(0, 2, 3, 1), count), (b, weight))

    return stream(step, routes, (count, weight), (a, b)) + bias


def _mean_rows(a: Tensor, count: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Rows a (B, r, c, S) and count (B, r, N/C), and all columns b (B, S, N/C, c), to (B, r, N/C, c_z)."""
    outer = (a.flatten(1, 2) @ b.flatten(2)).unflatten(1, a.shape[1:3]).unflatten(3, b.shape[2:])
    outer = outer.transpose(2, 3).flatten(3)
    return linear(outer / count[..., None].to(outer.dtype), weight)


def pair_counts(msa_mask: Tensor, cp: ContextParallel) -> Tensor:
    """Number of sequences that cover both tokens of a pair, at least 1.

    Args:
        msa_mask: MSA block (B, S/R, N/C).
        cp: the running grid.

    Returns:
        Tile (B, N/R, N/C) float32.
    """
    mask = msa_mask.float()
    rows_coming, cols_coming = _fetch_rows(mask, cp), _fetch_cols(mask, cp)
    rows, cols = finish(rows_coming), finish(cols_coming)
    # bf16 does not hold every count above 256.
    with torch.autocast(mask.device.type, enabled=False):
        return (rows.mT @ cols).clamp(min=1)


def _fetch_rows(x: Tensor, cp: ContextParallel) -> Pending:
    """MSA block (B, S/R, N/C, ...) to all sequences of the pair tile's rows, (B, S, N/R, ...)."""
    s, n = x.shape[1] * cp.grid.rows, x.shape[2] * cp.grid.cols
    wants = all_rows_of_tile_rows(cp.grid, s, n)
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, OP)


def _fetch_cols(x: Tensor, cp: ContextParallel) -> Pending:
    """MSA block (B, S/R, N/C, ...) to all sequences of the pair tile's columns, (B, S, N/C, ...)."""
    s, n = x.shape[1] * cp.grid.rows, x.shape[2] * cp.grid.cols
    wants = all_rows_of_tile_cols(cp.grid, s, n)
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, OP)
