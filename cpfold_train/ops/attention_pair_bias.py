"""Attention with pair bias: tokens attend to tokens, with a bias from the pair representation.

AlphaFold 3, Algorithm 24. The bias never moves. Rank (I, J) attends its tile's rows (queries) to its tile's columns
(keys), and the partial results merge over the ranks of a grid row by log-sum-exp: each sends about 2 (N/R) c_s elements
there. What follows for a token goes on with the tile's rows, and at the end each rank sends (N/R) c_s elements to the
others of its column, so that every rank has all tokens again.

With torch's kernels the scores of a tile are held; with fused ones they are not, and computed again in the backward
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.attention import is_fused
from cpfold_train.kernels.partial_attention import partial_attention, partial_gradients
from cpfold_train.kernels.regions import region
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.redistribute import all_reduce, all_reduce_max, redistribute

OP = "attention_pair_bias"


def attention_pair_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor, cp: ContextParallel) -> Tensor:
    """``o_i = sum_j softmax_j(q_i . k_j + bias_ij - 1e6 (1 - mask_j)) v_j`` for each head.

    Args:
        q: (B, N/R, h, d) of the tile's rows, already scaled.
        k, v: (B, N/C, h, d) of the tile's columns.
        bias: tile (B, N/R, N/C, h).
        key_mask: (B, N/C) of the tile's columns, 1 for real tokens.
        cp: the running grid.

    Returns:
        (B, N/R, h, d) of the tile's rows, over the keys of all columns.
    """
    if is_fused(cp.kernels, q):
        masked = (key_mask[:, None, None].to(bias.dtype) - 1) * 1e6
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return _Merged.apply(*heads_first, bias.permute(0, 3, 1, 2), masked, cp).transpose(1, 2)
    scores, row_max = _scores(q, k, bias, key_mask)
    found = _weighted(scores, all_reduce_max(row_max, cp, cp.col, OP), v)
    return _quotient(all_reduce(found, cp, cp.col, OP))


@region
def _scores(q: Tensor, k: Tensor, bias: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, N/R, N/C), and the largest of each query."""
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT + bias.permute(0, 3, 1, 2)
    scores = scores + (key_mask[:, None, None].to(scores.dtype) - 1) * 1e6
    return scores, scores.detach().amax(-1, keepdim=True)


@region
def _weighted(scores: Tensor, row_max: Tensor, v: Tensor) -> Tensor:
    """Sums of the values, and in the last channel those of their weights, (B, h, N/R, d + 1)."""
    weights = (scores - row_max).exp()
    return torch.cat([weights @ v.transpose(1, 2), weights.sum(-1, keepdim=True)], -1)


@region
def _quotient(merged: Tensor) -> Tensor:
    return (merged[..., :-1] / merged[..., -1:]).transpose(1, 2)


class _Merged(torch.autograd.Function):
    """Of q, k, v (B, h, n, d), bias (B, h, M, N) and what is added to it (B, 1, 1, N), by partial attention."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masked: Tensor, cp: ContextParallel) -> Tensor:
        # Keys last in memory, as the kernels want it.
        bias = torch.add(bias, masked, out=bias.new_empty(bias.shape))
        q, k, v = (x[:, None] for x in (q, k, v))
        part, part_lse = (x[:, 0] for x in partial_attention(q, k, v, bias, cp.kernels))
        # The weight of a rank's part is the exponential of its lse, scaled by the largest so that it cannot overflow.
        largest = all_reduce_max(part_lse[..., None], cp, cp.col, OP)
        weight = (part_lse[..., None] - largest).exp()
        merged = all_reduce(torch.cat([part * weight, weight], -1), cp, cp.col, OP)
        denom = merged[..., -1:]
        out = (merged[..., :-1] / denom).to(q.dtype)
        ctx.cp = cp
        ctx.save_for_backward(q, k, v, bias, out, (largest + denom.log()).squeeze(-1))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, out, lse = ctx.saved_tensors
        cp = ctx.cp
        # The ranks of a grid row have the same result, and each a part of its gradient.
        grad = all_reduce(grad, cp, cp.col, OP)
        delta = (grad * out).sum(-1, dtype=lse.dtype)
        dq, dbias = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, bias))
        grad, lse, delta = (x[:, None] for x in (grad, lse, delta))
        dk, dv = partial_gradients(q, k, v, bias, grad, lse, delta, dq, dbias, cp.kernels)
        grads = [x[:, 0].to(q.dtype) for x in (dq, dk, dv)]
        return *grads, dbias.to(bias.dtype), None, None


def all_tokens(x: Tensor, cp: ContextParallel) -> Tensor:
    """The tile's rows (B, N/R, ...), which all ranks of a grid row have alike, to all tokens (B, N, ...)."""
    n = x.shape[1] * cp.grid.rows
    rows = tuple((part,) for part in split(n, cp.grid.rows))
    return redistribute(x, cp, cp.row, (1,), rows, (((0, n),),) * cp.grid.rows, OP)
