"""Pair weighted averaging: each MSA row is averaged over tokens with weights from the pair representation.

AlphaFold 3, Algorithm 10. The weights of a token are a softmax over a whole row of z, but have only h channels: rank
(I, J), which holds tokens N_J of the MSA, receives the rows N_J of the logits, (N/C) N h elements. The values of its
sequences are gathered along the token axis, (S/R) N h d elements. Both come for some heads at a time, and the next
heads travel meanwhile: as many as have weights that fit a block, or, with the fused kernels, weights and values.
"""

from __future__ import annotations

from torch import Tensor

from cpfold_train.kernels.by_rows import rows_per_block
from cpfold_train.kernels.fused import product_dtype
from cpfold_train.kernels.pair_weighted_averaging import (
    fused_average,
    fused_average_gradients,
    has_kernels,
    weighted_average,
)
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.exchange_plan import ExchangePlan
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import bands_of_tile_cols, row_bands, tiles


def pair_weighted_averaging(v: Tensor, logits: Tensor, key_mask: Tensor, cp: ContextParallel) -> Tensor:
    """``o_si = sum_j softmax_j(logits_ij) v_sj`` for each head.

    Args:
        v: MSA block (B, S/R, N/C, h, d).
        logits: pair tile (B, N/R, N/C, h).
        key_mask: (B, N), 1 for real tokens.
        cp: the running grid.

    Returns:
        MSA block (B, S/R, N/C, h, d).
    """
    s, n, heads, op = v.shape[1] * cp.grid.rows, v.shape[2] * cp.grid.cols, v.shape[3], "pair_weighted_averaging"
    fused = has_kernels(logits, v, cp.kernels)
    keys = v.shape[0] * n
    if fused:
        v = v.to(product_dtype(v))
        head_bytes = keys * (v.shape[2] + v.shape[1] * v.shape[4]) * v.element_size()
    else:
        head_bytes = keys * v.shape[2] * max(4, logits.element_size())
    groups = [slice(*group) for group in split(heads, -(-heads // rows_per_block(head_bytes, v.device)))]
    # Values come with all that one token has side by side, as the product takes them.
    moves = (
        ((2, 3), tiles(cp.grid, n, n), bands_of_tile_cols(cp.grid, n)),
        ((3, 2), tiles(cp.grid, s, n), row_bands(cp.grid, s, n)),
    )
    plans = [[ExchangePlan(cp, cp.all, dims, has, wants, op) for dims, has, wants in moves] for _ in groups]
    sources = logits.permute(0, 3, 1, 2), v.permute(0, 3, 2, 1, 4)
    average, gradients = (_fused_average, _fused_gradients) if fused else (_average, None)
    o = stream(average, plans, (key_mask,), sources, dim=1, gradients=gradients, parts=groups)
    return o.permute(0, 3, 2, 1, 4)


def _average(_: int, *tensors: Tensor) -> Tensor:
    return weighted_average(*tensors)


def _fused_average(_: int, *tensors: Tensor) -> Tensor:
    return fused_average(*tensors)


def _fused_gradients(_: int, grad: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    return fused_average_gradients(grad, *tensors)
