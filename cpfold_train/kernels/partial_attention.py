"""Attention to some of the keys: what several ranks, or several steps of a ring, find can be merged afterwards.

Over the keys that are at hand, the softmax is complete; with it goes the logarithm of its denominator. Two such results
merge by these logarithms, and given the merged one the gradients of each part are the part's own affair. As in
:mod:`cpfold_train.kernels.attention`, which is for all keys at once, the scores are never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.attention import is_fused, score_blocks


def partial_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head on its own, and the logarithm of its denominator.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked.
        kernels: ``torch``, ``triton`` or ``cuequivariance``; the package has no such kernel, Triton's takes its place.

    Returns:
        (B, r, h, M, d) in the dtype of ``q``, and (B, r, h, M) in fp32 at least. Without gradient.
    """
    if is_fused(kernels, q):
        return torch.ops.cpfold.attention(q, k, v, bias, None)
    wide = torch.promote_types(bias.dtype, torch.float32)
    out, log_total = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=wide)
    for r, i in score_blocks(q, bias):
        scores = (q[:, r, :, i] @ k[:, r].mT).to(wide).add_(bias[:, None, :, i])
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, r, :, i] = (weights.to(v.dtype) @ v[:, r]) / total
        log_total[:, r, :, i] = (highest + total.log()).squeeze(-1)
    return out, log_total


def partial_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    grad: Tensor,
    log_total: Tensor,
    shift: Tensor,
    dq: Tensor,
    dbias: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """What these keys add to the gradients.

    Args:
        q, k, v, bias: as for :func:`partial_attention`.
        grad: (B, r, h, M, d) gradient of the merged result.
        log_total: (B, r, h, M) logarithm of the denominator over all keys, not only these.
        shift: (B, r, h, M) product of ``grad`` and the merged result.
        dq, dbias: gradients of ``q`` and ``bias``, to which these keys' are added in place; fp32 at least.
        kernels: as for :func:`partial_attention`.

    Returns:
        Gradients of ``k`` and ``v``, fp32 at least.
    """
    wide = dbias.dtype
    if is_fused(kernels, q):
        dk, dv = (torch.empty_like(x, dtype=wide) for x in (k, v))
        torch.ops.cpfold.attention_backward(q, k, v, bias, grad, log_total, shift, dq, dk, dv, dbias, True)
        return dk, dv
    # Transposed: the product of a thin matrix with a wide one is several times faster than the other way around.
    dk, dv = (torch.zeros_like(x.mT, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    for r, i in score_blocks(q, bias):
        q_i, g_i = q[:, r, :, i], grad[:, r, :, i]
        scores = (q_i @ k[:, r].mT).to(wide).add_(bias[:, None, :, i])
        weights = scores.sub_(log_total[:, r, :, i, None]).exp_()
        dv[:, r] += g_i.mT @ weights.to(g_i.dtype)
        dscores = (g_i @ v[:, r].mT).to(wide).sub_(shift[:, r, :, i, None]).mul_(weights)
        for row in dscores.unbind(1):
            dbias[:, :, i] += row
        dscores = dscores.to(q.dtype)
        dq[:, r, :, i] += dscores @ k[:, r]
        dk[:, r] += q_i.mT @ dscores
    return dk.mT, dv.mT
