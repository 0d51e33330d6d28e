"""Local attention with an additive bias, without holding more scores than fit in cache.

The scores of complete rows are (B, r, h, N, N). They are computed for some queries at a time, and again in the backward
pass (Dao et al., "FlashAttention", NeurIPS 2022). Unlike torch's fused CPU kernel this gives the gradient of the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.by_rows import rows_per_block


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head on its own; the softmax is in the bias's precision.

    Args:
        q: (B, r, h, N, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, N, N), the same for all r rows; very negative where a key is masked.

    Returns:
        (B, r, h, N, d).
    """
    return _BiasedAttention.apply(q, k, v, bias)


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Softmax of the scores (B, r, h, queries, N)."""
    scores = (q @ k.mT).to(torch.promote_types(bias.dtype, torch.float32)).add_(bias[:, None])
    return torch.softmax(scores, -1, out=scores)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n = q.shape[3]
        step = rows_per_block(q.shape[:3].numel() * k.shape[3] * bias.element_size())
        parts = []
        for start in range(0, n, step):
            queries = slice(start, start + step)
            weights = _weights(q[..., queries, :], k, bias[:, :, queries])
            parts.append(weights.to(v.dtype) @ v)
        # What fits in one block is cheaper to keep until the backward pass, which comes at once, than to do again.
        ctx.save_for_backward(q, k, v, bias, weights if step >= n else None)
        ctx.step = step
        return torch.cat(parts, 3) if len(parts) > 1 else parts[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, kept = ctx.saved_tensors
        parts = []
        for start in range(0, q.shape[3], ctx.step):
            queries = slice(start, start + ctx.step)
            weights = _weights(q[..., queries, :], k, bias[:, :, queries]) if kept is None else kept
            g = grad[..., queries, :]
            dweights = (g @ v.mT).to(weights.dtype)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dbias = dscores.sum(1) if dscores.shape[1] > 1 else dscores[:, 0]
            dscores = dscores.to(q.dtype)
            parts.append((dscores @ k, dscores.mT @ q[..., queries, :], weights.to(g.dtype).mT @ g, dbias))
        if len(parts) == 1:
            return parts[0]
        dq, dk, dv, dbias = zip(*parts)
        return torch.cat(dq, 3), sum(dk), sum(dv), torch.cat(dbias, 2)
