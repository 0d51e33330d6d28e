"""Outer product mean: what the columns i and j of the MSA say together about the pair (i, j).

AlphaFold 3, Algorithm 9. Rank (I, J) needs its pair tile's rows of ``a`` and its columns of ``b``, of all sequences;
both are fetched from where they lie, about S N c (1/R + 1/C) elements, and the product is local.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from cpfold_train.ops.by_rows import by_rows, rows_per_block
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import all_rows_of_tile_cols, all_rows_of_tile_rows, tiles
from cpfold_train.parallel.redistribute import Pending, finish, start


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
    a_coming, b_coming = _fetch_rows(a, cp), _fetch_cols(b, cp)
    a, b = finish(a_coming), finish(b_coming)
    rows = rows_per_block(b[:, 0].numel() * b.shape[3] * b.element_size(), b.device)
    return by_rows(_mean_rows, rows, (a.permute(0, 2, 3, 1), count), (b, weight, bias))


def _mean_rows(a: Tensor, count: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows a (B, r, c, S) and count (B, r, N/C), and all columns b (B, S, N/C, c), to (B, r, N/C, c_z)."""
    outer = (a.flatten(1, 2) @ b.flatten(2)).unflatten(1, a.shape[1:3]).unflatten(3, b.shape[2:])
    outer = outer.transpose(2, 3).flatten(3)
    return linear(outer / count[..., None].to(outer.dtype), weight, bias)


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
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, "outer_product_mean")


def _fetch_cols(x: Tensor, cp: ContextParallel) -> Pending:
    """MSA block (B, S/R, N/C, ...) to all sequences of the pair tile's columns, (B, S, N/C, ...)."""
    s, n = x.shape[1] * cp.grid.rows, x.shape[2] * cp.grid.cols
    wants = all_rows_of_tile_cols(cp.grid, s, n)
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, "outer_product_mean")
