"""Attention with an additive bias whose keys and values come around a ring, one block of tokens after the other.

Liu et al., "Ring Attention with Blockwise Transformers", ICLR 2024, with each block fetched straight from the rank that
has it. The softmax is merged over the blocks by its running maximum and sum, or by the log-sum-exp of each block where
a fused kernel gives that; the backward pass fetches every block again, and each block's gradient travels back while the
next block is worked on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpfold_train.kernels.attention import is_fused, score_blocks
from cpfold_train.kernels.partial_attention import partial_attention, partial_gradients
from cpfold_train.ops.stream import Returning, pieces_in_turn, send_grads, wait_grads
from cpfold_train.parallel.redistribute import Route

RingStep = tuple[Route, Route]
"""How the block of keys and values, and the bias of this rank's queries to it, come to this rank."""


def ring_attention(q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], kernels: str) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` over the keys j of all steps, for each row and head on its own.

    Args:
        q: (B, r, h, M, d) this rank's queries, already scaled.
        kv: (B, r, h, n, 2, d) the keys and values that this rank has.
        bias: (B, h, ..., ...) the part of the bias that this rank has.
        steps: routes of ``kv`` to (B, r, h, n_k, 2, d) and of ``bias`` to (B, h, M, n_k), the same steps on all ranks.
        kernels: as for :func:`~cpfold_train.kernels.partial_attention.partial_attention`.

    Returns:
        (B, r, h, M, d).
    """
    return _RingAttention.apply(q, kv, bias, steps, kernels)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], kernels: str) -> Tensor:
        around = _by_log_sum_exp if is_fused(kernels, q) else _by_maximum_and_sum
        out, log_total = around(q, kv, bias, steps, kernels)
        ctx.steps, ctx.kernels = steps, kernels
        ctx.save_for_backward(q, kv, bias, out, log_total)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, kv, bias, out, log_total = ctx.saved_tensors
        wide = log_total.dtype
        shift = (grad * out).sum(-1, dtype=wide)
        dq, dkv, dbias = (torch.zeros_like(x, dtype=wide) for x in (q, kv, bias))
        returning: list[Returning] = []
        for (kv_route, bias_route), (kv_k, bias_k) in zip(ctx.steps, pieces_in_turn(ctx.steps, (kv, bias))):
            k, v = kv_k.unbind(-2)
            dbias_k = torch.zeros_like(bias_k, dtype=wide)
            dk, dv = partial_gradients(q, k, v, bias_k, grad, log_total, shift, dq, dbias_k, ctx.kernels)
            wait_grads(returning)
            returning = [(kv_route, torch.stack([dk, dv], -2), dkv), (bias_route, dbias_k, dbias)]
            send_grads(returning)
        wait_grads(returning)
        return dq.to(q.dtype), dkv.to(kv.dtype), dbias.to(bias.dtype), None, None


def _by_maximum_and_sum(
    q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], _: str
) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp, each block's scores scaled to the highest so far."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    out = torch.zeros_like(q, dtype=wide)
    highest = torch.full_like(q[..., :1], -torch.inf, dtype=wide)
    total = torch.zeros_like(highest)
    for kv_k, bias_k in pieces_in_turn(steps, (kv, bias)):
        k, v = kv_k.unbind(-2)
        for r, i in score_blocks(q, bias_k):
            scores = (q[:, r, :, i] @ k[:, r].mT).to(wide).add_(bias_k[:, None, :, i])
            before = highest[:, r, :, i]
            now = torch.maximum(before, scores.amax(-1, keepdim=True))
            weights, rescale = scores.sub_(now).exp_(), (before - now).exp()
            highest[:, r, :, i] = now
            total[:, r, :, i] = total[:, r, :, i] * rescale + weights.sum(-1, keepdim=True)
            out[:, r, :, i] = out[:, r, :, i] * rescale + weights.to(v.dtype) @ v[:, r]
    return (out / total).to(q.dtype), (highest + total.log()).squeeze(-1)


def _by_log_sum_exp(
    q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], kernels: str
) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp, each block's complete softmax weighted by its part of all."""
    out = log_total = None
    for kv_k, bias_k in pieces_in_turn(steps, (kv, bias)):
        part, log_part = partial_attention(q, *kv_k.unbind(-2), bias_k, kernels)
        if out is None:
            out, log_total = part.to(log_part.dtype), log_part
        else:
            log_before, log_total = log_total, torch.logaddexp(log_total, log_part)
            out = out.mul_((log_before - log_total).exp_()[..., None])
            out.addcmul_(part, (log_part - log_total).exp_()[..., None])
    return out.to(q.dtype), log_total
