"""Attention to some of the keys: what several ranks, or several steps of a ring, find can be merged afterwards.

Over the keys that are at hand, the softmax is complete; with it goes the log-sum-exp of its scores (lse). Two such
results merge by their lse (:func:`add_part`), and given the merged one, gradients of a part need no other part. As in
:mod:`cpfold_train.kernels.attention`, which is for all keys at once, the scores are never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.attention import is_fused
from cpfold_train.kernels.blockwise_attention import blockwise_attention, blockwise_gradients


def partial_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head on its own, and the log-sum-exp of the scores.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked.
        kernels: ``torch``, ``triton`` or ``cuequivariance``; the package has no such kernel, so Triton's is taken.

    Returns:
        (B, r, h, M, d) in the dtype of ``q``, and (B, r, h, M) in fp32 at least. Without gradient.
    """
    if is_fused(kernels, q):
        return torch.ops.cpfold.attention(q, k, v, bias, None)
    return blockwise_attention(q, k, v, bias, with_lse=True)


def partial_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dbias: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """What these keys add to the gradients.

    Args:
        q, k, v, bias: as for :func:`partial_attention`.
        grad: (B, r, h, M, d) gradient of the merged result.
        lse: (B, r, h, M) log-sum-exp over all keys, not only these.
        delta: (B, r, h, M) products of ``grad`` and the merged result.
        dq, dbias: gradients of ``q`` and ``bias``, to which these keys' are added in place; fp32 at least.
        kernels: as for :func:`partial_attention`.

    Returns:
        Gradients of ``k`` and ``v``, fp32 at least.
    """
    if is_fused(kernels, q):
        dk, dv = (torch.empty_like(x, dtype=dbias.dtype) for x in (k, v))
        torch.ops.cpfold.attention_backward(q, k, v, bias, grad, lse, delta, dq, dk, dv, dbias, True)
        return dk, dv
    return blockwise_gradients(q, k, v, bias, grad, dq, dbias, lse, delta)


def add_part(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """Add the result over some more keys to one over others, in place.

    Args:
        out: (..., d) in fp32 at least; becomes the result over all of them.
        lse: (...) of its keys.
        part, part_lse: of the others.

    Returns:
        (...) log-sum-exp over all of them.
    """
    merged = torch.logaddexp(lse, part_lse)
    out.mul_((lse - merged).exp_()[..., None]).addcmul_(part, (part_lse - merged).exp_()[..., None])
    return merged
