"""Outer product mean: what the columns i and j of the MSA say together about the pair (i, j).

AlphaFold 3, Algorithm 9. Rank (I, J) needs its pair tile's rows of ``a`` and its columns of ``b``, of all sequences;
both are gathered from where they lie, about S N c (1/R + 1/C) elements, all sequences at once if there is room for
them, and the products are local.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels import outer_product_mean as kernel
from cpfold_train.kernels.fused import product_dtype
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.exchange_plan import ExchangePlan
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import all_rows_of_tile_cols, all_rows_of_tile_rows, col_parts, row_parts, tiles
from cpfold_train.parallel.redistribute import Pending, finish, start

OP = "outer_product_mean"
GATHERED_BYTES = 1 << 31
"""What is gathered of ``a`` and ``b`` at most, the sequences that travel included. Few parts are better, since each of
them is projected from c * c channels a pair: of 3,072 tokens on 2x2 this holds 10,922 sequences in bf16."""


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
    fused = kernel.has_kernels(a, weight, cp.kernels)
    if fused:
        a, b = a.to(product_dtype(a)), b.to(product_dtype(b))
    s, n = a.shape[1] * cp.grid.rows, a.shape[2] * cp.grid.cols
    has = tiles(cp.grid, s, n)
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    gathered_bytes = s * (n // cp.grid.rows + n // cp.grid.cols) * a.shape[0] * a.shape[3] * a.element_size()
    # While one part is worked on the next one travels.
    parts = 1 if gathered_bytes <= GATHERED_BYTES else min(s, -(-2 * gathered_bytes // GATHERED_BYTES))
    plans = []
    for depth in split(s, parts):
        wants = (tuple((depth, tokens) for tokens in parts) for parts in (rows, cols))
        plans.append([ExchangePlan(cp, cp.all, (1, 2), has, boxes, OP) for boxes in wants])
    if fused:
        return stream(_fused_part, plans, (count, weight, bias), (a, b), gradients=_fused_gradients)
    return stream(_part, plans, (count, weight), (a, b)) + bias


def _part(_: int, count: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return kernel.outer_product_mean(a, b, count, weight)


def _fused_part(k: int, count: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return kernel.fused_mean(a, b, count, weight, bias if k == 0 else None)


def _fused_gradients(
    k: int, grad: Tensor, count: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor | None, ...]:
    da, db, dweight = kernel.fused_mean_gradients(grad, a, b, count, weight)
    return None, dweight, grad.sum((0, 1, 2), dtype=torch.float32) if k == 0 else None, da, db


def pair_counts(msa_mask: Tensor, cp: ContextParallel) -> Tensor:
    """Number of sequences that cover both tokens of a pair, at least 1.

    Args:
        msa_mask: MSA block (B, S/R, N/C).
        cp: the running grid.

    Returns:
        Tile (B, N/R, N/C) float32.
    """
    mask = msa_mask.float()
    rows_coming, cols_coming = _start_rows(mask, cp), _start_cols(mask, cp)
    rows, cols = finish(rows_coming), finish(cols_coming)
    # bf16 does not hold every count above 256.
    with torch.autocast(mask.device.type, enabled=False):
        return (rows.mT @ cols).clamp(min=1)


def _start_rows(x: Tensor, cp: ContextParallel) -> Pending:
    """MSA block (B, S/R, N/C, ...) to all sequences of the pair tile's rows, (B, S, N/R, ...)."""
    s, n = x.shape[1] * cp.grid.rows, x.shape[2] * cp.grid.cols
    wants = all_rows_of_tile_rows(cp.grid, s, n)
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, OP)


def _start_cols(x: Tensor, cp: ContextParallel) -> Pending:
    """MSA block (B, S/R, N/C, ...) to all sequences of the pair tile's columns, (B, S, N/C, ...)."""
    s, n = x.shape[1] * cp.grid.rows, x.shape[2] * cp.grid.cols
    wants = all_rows_of_tile_cols(cp.grid, s, n)
    return start(x, cp, cp.all, (1, 2), tiles(cp.grid, s, n), wants, OP)
