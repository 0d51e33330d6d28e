"""Attention with pair bias: tokens attend to tokens, with a bias from the pair representation.

AlphaFold 3, Algorithm 24. The bias never moves. Rank (I, J) attends its tile's rows (queries) to its tile's columns
(keys), and the partial results merge over the ranks of a grid row by log-sum-exp: each sends about 2 (N/R) c_s elements
there and (N/R) c_s to the others of its column, so that every rank ends with all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.redistribute import all_reduce, all_reduce_max, redistribute


def attention_pair_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor, cp: ContextParallel) -> Tensor:
    """``o_i = sum_j softmax_j(q_i . k_j + bias_ij - 1e6 (1 - mask_j)) v_j`` for each head.

    Args:
        q, k, v: (B, N, h, d), the same on all ranks; q is already scaled.
        bias: tile (B, N/R, N/C, h).
        key_mask: (B, N), 1 for real tokens.
        cp: the running grid.

    Returns:
        (B, N, h, d), the same on all ranks.
    """
    n, op = q.shape[1], "attention_pair_bias"
    rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
    q, k, v = q[:, rows].transpose(1, 2), k[:, cols].transpose(1, 2), v[:, cols].transpose(1, 2)
    scores = q @ k.mT + bias.permute(0, 3, 1, 2)
    scores = scores + (key_mask[:, None, None, cols].to(scores.dtype) - 1) * 1e6

    highest = all_reduce_max(scores.amax(-1, keepdim=True), cp, cp.col, op)
    weights = (scores - highest).exp()
    merged = all_reduce(torch.cat([weights @ v, weights.sum(-1, keepdim=True)], -1), cp, cp.col, op)
    o = (merged[..., :-1] / merged[..., -1:]).transpose(1, 2)

    by_rows = tuple((part,) for part in split(n, cp.grid.rows))
    return redistribute(o, cp, cp.row, (1,), by_rows, (((0, n),),) * cp.grid.rows, op)
