"""Attention with pair bias: tokens attend to tokens, with a bias from the pair representation.

AlphaFold 3, Algorithm 24. The bias never moves. Rank (I, J) attends its tile's rows (queries) to its tile's columns
(keys), and the partial results merge over the ranks of a grid row by log-sum-exp: each sends about 2 (N/R) c_s elements
there. What follows for a token goes on with the tile's rows, and at the end each rank sends (N/R) c_s elements to the
others of its column, so that every rank has all tokens again.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    scores, highest = _scores(q, k, bias, key_mask)
    found = _weighted(scores, all_reduce_max(highest, cp, cp.col, OP), v)
    return _quotient(all_reduce(found, cp, cp.col, OP))


@region
def _scores(q: Tensor, k: Tensor, bias: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, N/R, N/C), and the highest of each query."""
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT + bias.permute(0, 3, 1, 2)
    scores = scores + (key_mask[:, None, None].to(scores.dtype) - 1) * 1e6
    return scores, scores.detach().amax(-1, keepdim=True)


@region
def _weighted(scores: Tensor, highest: Tensor, v: Tensor) -> Tensor:
    """Sums of the values, and in the last channel those of their weights, (B, h, N/R, d + 1)."""
    weights = (scores - highest).exp()
    return torch.cat([weights @ v.transpose(1, 2), weights.sum(-1, keepdim=True)], -1)


@region
def _quotient(merged: Tensor) -> Tensor:
    return (merged[..., :-1] / merged[..., -1:]).transpose(1, 2)


def all_tokens(x: Tensor, cp: ContextParallel) -> Tensor:
    """The tile's rows (B, N/R, ...), which all ranks of a grid row have alike, to all tokens (B, N, ...)."""
    n = x.shape[1] * cp.grid.rows
    rows = tuple((part,) for part in split(n, cp.grid.rows))
    return redistribute(x, cp, cp.row, (1,), rows, (((0, n),),) * cp.grid.rows, OP)
