"""Local attention with an additive bias, without ever holding the scores.

The scores of complete rows are (B, r, h, N, N). They are computed for one row and some queries at a time, and again in
the backward pass (Dao et al., "FlashAttention", NeurIPS 2022). Unlike torch's fused CPU kernel this gives the gradient
of the bias. Queries are the outer loop, so that their part of the bias and of its gradient stays in cache for all rows.

On NVIDIA GPUs the kernel of the cuEquivariance package can do the same (not measured).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import rows_per_block

SCORE_BYTES = 1 << 19
"""Scores that a CPU thread takes at a time: it goes over them ten times, so they should fit in its core's cache."""


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernels: str = "torch") -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head on its own; the softmax is in fp32 at least.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked.
        kernels: ``torch``, ``triton`` or ``cuequivariance``. The cuEquivariance package works on CUDA tensors only; its
            limits on d and dtype are those of ``cuequivariance_torch.triangle_attention``.

    Returns:
        (B, r, h, M, d).
    """
    if kernels == "cuequivariance":
        from cuequivariance_torch import triangle_attention

        return triangle_attention(q, k, v, bias[:, None], scale=1.0)
    return _BiasedAttention.apply(q, k, v, bias)


def score_blocks(q: Tensor, bias: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and queries of ``q`` (B, r, h, M, d) to take at a time, for scores with a bias (B, h, M, N)."""
    score_bytes = bias[:, :, 0].numel() * max(4, bias.element_size())
    cpu_bytes = SCORE_BYTES * torch.get_num_threads()
    queries = _even(bias.shape[2], max(16, rows_per_block(score_bytes, q.device, cpu_bytes)))
    rows = _even(q.shape[1], rows_per_block(score_bytes * queries, q.device, cpu_bytes))
    for first in range(0, bias.shape[2], queries):
        for row in range(0, q.shape[1], rows):
            yield slice(row, row + rows), slice(first, first + queries)


def _even(total: int, most: int) -> int:
    """Size of the fewest equal parts of ``total`` that have at most ``most``."""
    parts = -(-total // most)
    return -(-total // parts)


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Softmax of the scores (B, rows, h, queries, N)."""
    scores = (q @ k.mT).to(torch.promote_types(bias.dtype, torch.float32)).add_(bias[:, None])
    return torch.softmax(scores, -1, out=scores)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty_like(q)
        for r, i in score_blocks(q, bias):
            weights = _weights(q[:, r, :, i], k[:, r], bias[:, :, i])
            out[:, r, :, i] = weights.to(v.dtype) @ v[:, r]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias = ctx.saved_tensors
        wide = torch.promote_types(bias.dtype, torch.float32)
        dq = torch.empty_like(q)
        dbias = torch.zeros_like(bias, dtype=wide)
        # Transposed: the product of a thin matrix with a wide one is several times faster than the other way around.
        dk, dv = (torch.zeros_like(x.mT, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
        for r, i in score_blocks(q, bias):
            q_i, g_i = q[:, r, :, i], grad[:, r, :, i]
            weights = _weights(q_i, k[:, r], bias[:, :, i])
            dv[:, r] += g_i.mT @ weights.to(g_i.dtype)
            dscores = (g_i @ v[:, r].mT).to(wide)
            torch._softmax_backward_data(dscores, weights, -1, wide, grad_input=dscores)
            for row in dscores.unbind(1):
                dbias[:, :, i] += row
            dscores = dscores.to(q.dtype)
            dq[:, r, :, i] = dscores @ k[:, r]
            dk[:, r] += q_i.mT @ dscores
        return dq, dk.mT.to(k.dtype), dv.mT.to(v.dtype), dbias.to(bias.dtype)
