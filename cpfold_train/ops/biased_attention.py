"""Local attention with an additive bias, without ever holding the scores.

The scores of complete rows are (B, r, h, N, N): hundreds of tiles. They are computed block by block, in blocks that
stay in cache, and computed again in the backward pass from the saved log-sum-exp (Dao et al., "FlashAttention",
NeurIPS 2022). Unlike torch's fused CPU kernel this gives the gradient of the bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Scores computed at a time: 4 MiB in fp32, small enough for a core's share of the last-level cache."""


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij - 1e9 (1 - mask_j)) v_j`` for each row and head on its own.

    Args:
        q: (B, h, r, N, d) queries, already scaled.
        k, v: (B, h, r, N, d).
        bias: (B, h, N, N), the same for all r rows.
        key_mask: (B, N), 1 for real tokens.

    Returns:
        (B, h, r, N, d).
    """
    return _BiasedAttention.apply(q, k, v, bias, (key_mask.to(bias.dtype) - 1) * 1e9)


def _blocks(q: Tensor, keys: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Batch, head, rows and queries of each block: several rows at a time, or some queries of a single row."""
    b, h, r, n, _ = q.shape
    rows = max(1, BLOCK_ELEMENTS // (n * keys))
    queries = n if rows > 1 else max(1, min(n, BLOCK_ELEMENTS // keys))
    for i in range(b):
        for head in range(h):
            for first in range(0, n, queries):
                for row in range(0, r, rows):
                    yield i, head, slice(row, row + rows), slice(first, first + queries)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask_bias: Tensor) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1], dtype=bias.dtype)
        for i, h, rows, queries in _blocks(q, k.shape[3]):
            scores = _scores(q, k, bias, mask_bias, i, h, rows, queries)
            part = torch.logsumexp(scores, -1)
            lse[i, h, rows, queries] = part
            weights = scores.sub_(part[..., None]).exp_()
            out[i, h, rows, queries] = weights.to(v.dtype) @ v[i, h, rows]
        ctx.save_for_backward(q, k, v, bias, mask_bias, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, mask_bias, out, lse = ctx.saved_tensors
        dq, dk, dv, dbias = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(bias)
        for i, h, rows, queries in _blocks(q, k.shape[3]):
            scores = _scores(q, k, bias, mask_bias, i, h, rows, queries)
            weights = scores.sub_(lse[i, h, rows, queries, None]).exp_()
            g = grad[i, h, rows, queries]
            dv[i, h, rows] += weights.to(g.dtype).mT @ g
            delta = (g * out[i, h, rows, queries]).sum(-1, keepdim=True)
            dscores = (g @ v[i, h, rows].mT).sub_(delta).to(weights.dtype).mul_(weights)
            dbias[i, h, queries] += dscores.sum(0)
            dscores = dscores.to(q.dtype)
            dq[i, h, rows, queries] = dscores @ k[i, h, rows]
            dk[i, h, rows] += dscores.mT @ q[i, h, rows, queries]
        return dq, dk, dv, dbias, None


def _scores(
    q: Tensor, k: Tensor, bias: Tensor, mask_bias: Tensor, i: int, h: int, rows: slice, queries: slice
) -> Tensor:
    """Scores (rows, queries, keys) of one block, in the bias's precision."""
    scores = (q[i, h, rows, queries] @ k[i, h, rows].mT).to(bias.dtype)
    return scores.add_(bias[i, h, queries]).add_(mask_bias[i])
