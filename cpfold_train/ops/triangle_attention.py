"""Triangle attention: every pair (i, j) attends to the pairs of its row or of its column.

AlphaFold 3, Algorithms 14 (starting node) and 15 (ending node). An all-to-all inside the row group (the column group)
turns tiles into complete rows (columns), on which attention is local; the result goes back the same way. Only the
triangle bias, h channels of N x N, is needed whole by every rank and is gathered. Each rank sends
2 T (C - 1) / C elements forward for the starting node, 2 T (R - 1) / R for the ending node, and (P - 1) T h / c of
bias.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from cpfold_train.ops.biased_attention import biased_attention
from cpfold_train.ops.by_rows import by_rows, rows_per_block
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import everything, mirrored_tiles, tiles, whole_cols, whole_rows
from cpfold_train.parallel.redistribute import finish, redistribute, start


class Weights(NamedTuple):
    """Parameters: (c,) of the norm, (h, c) of ``bias``, (h d, c) of ``q``, ``k``, ``v``, ``g``, (c, h d) of ``o``."""

    norm_weight: Tensor
    norm_bias: Tensor
    bias: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor


def triangle_attention_starting(z: Tensor, token_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """Pair (i, j) attends to the pairs (i, k), with the bias of (j, k).

    Args:
        z: tile (B, N/R, N/C, c).
        token_mask: (B, N), 1 for real tokens.
        w: parameters.
        cp: the running grid.

    Returns:
        Update of the tile (B, N/R, N/C, c).
    """
    n, op = z.shape[1] * cp.grid.rows, "triangle_attention_start"
    as_tiles, as_rows = tiles(cp.grid, n, n), whole_rows(cp.grid, n, n)
    z_coming = start(z, cp, cp.all, (1, 2), as_tiles, as_rows, op)
    bias = _bias(z, token_mask[:, None, slice(*cp.grid.col_tokens(n))].expand(z.shape[:3]), w)
    bias_coming = start(bias, cp, cp.all, (2, 3), as_tiles, everything(cp.grid, n, n), op)
    update = _attend(finish(z_coming), finish(bias_coming), w)
    return redistribute(update, cp, cp.all, (1, 2), as_rows, as_tiles, op)


def triangle_attention_ending(z: Tensor, token_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """Pair (i, j) attends to the pairs (k, j), with the bias of (k, i); otherwise as
    :func:`triangle_attention_starting`, of which it is the transpose."""
    n, op = z.shape[1] * cp.grid.rows, "triangle_attention_end"
    as_tiles, as_cols = tiles(cp.grid, n, n), whole_cols(cp.grid, n, n)
    z_coming = start(z, cp, cp.all, (1, 2), as_tiles, as_cols, op)
    bias = _bias(z, token_mask[:, slice(*cp.grid.row_tokens(n)), None].expand(z.shape[:3]), w).mT.contiguous()
    bias_coming = start(bias, cp, cp.all, (2, 3), mirrored_tiles(cp.grid, n), everything(cp.grid, n, n), op)
    update = _attend(finish(z_coming).transpose(1, 2), finish(bias_coming), w)
    return redistribute(update.transpose(1, 2), cp, cp.all, (1, 2), as_cols, as_tiles, op)


def _bias(z: Tensor, key_mask: Tensor, w: Weights) -> Tensor:
    """Triangle bias of a tile, (B, h, N/R, N/C), with -1e9 where the key (B, N/R, N/C) is no real token."""

    def project(z: Tensor, key_mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        x = layer_norm(z, norm_weight.shape, norm_weight, norm_bias)
        bias = (weight @ x.flatten(1, 2).mT).unflatten(2, z.shape[1:3])
        return bias + (key_mask[:, None].to(bias.dtype) - 1) * 1e9

    rows = rows_per_block(z[:, :1].numel() * z.element_size(), z.device)
    return by_rows(project, rows, (z, key_mask), (w.norm_weight, w.norm_bias, w.bias), dim=2)


def _attend(z: Tensor, bias: Tensor, w: Weights) -> Tensor:
    """Gated attention within complete rows: z (B, r, N, c) and bias (B, h, N, N) to (B, r, N, c)."""
    heads, width = bias.shape[1], w.q.shape[0] // bias.shape[1]
    qkvg = torch.cat([w.q * width**-0.5, w.k, w.v, w.g])
    # The gradient of the whole bias is added up once per block: a block of one row would make that dear.
    qkvg_bytes = z[:, :1].numel() // z.shape[3] * qkvg.shape[0] * z.element_size()
    rows = max(4, rows_per_block(qkvg_bytes, z.device))
    return by_rows(partial(_attend_rows, heads), rows, (z,), (bias, w.norm_weight, w.norm_bias, qkvg, w.o))


def _attend_rows(
    heads: int, z: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkvg: Tensor, o: Tensor
) -> Tensor:
    x = layer_norm(z, norm_weight.shape, norm_weight, norm_bias)
    q, k, v, g = linear(x, qkvg).unflatten(-1, (4, heads, -1)).permute(3, 0, 1, 4, 2, 5).contiguous()
    attended = biased_attention(q, k, v, bias) * g.sigmoid()
    return linear(attended.transpose(2, 3).flatten(3), o)
