"""Attention with an additive bias whose keys and values come around a ring, one block of tokens after the other.

Liu et al., "Ring Attention with Blockwise Transformers", ICLR 2024, with each block sent straight from the rank that
has it. The results over the blocks merge by their log-sum-exp; in the backward pass every block comes again, and each
block's gradient travels back while the next block is worked on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpfold_train.kernels.partial_attention import add_part, partial_attention, partial_gradients
from cpfold_train.ops.stream import Returning, pieces_in_turn, wait_grads
from cpfold_train.parallel.exchange_plan import ExchangePlan

RingStep = tuple[ExchangePlan, ExchangePlan]
"""How the block of keys and values, and the bias of this rank's queries to it, come to this rank."""


def ring_attention(q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], kernels: str) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` over the keys j of all steps, for each row and head on its own.

    Args:
        q: (B, r, h, M, d) this rank's queries, already scaled.
        kv: (B, r, h, n, 2, d) the keys and values that this rank has.
        bias: (B, h, ..., ...) the part of the bias that this rank has.
        steps: plans of ``kv`` to (B, r, h, n_k, 2, d) and of ``bias`` to (B, h, M, n_k), the same steps on all ranks.
        kernels: as for :func:`~cpfold_train.kernels.partial_attention.partial_attention`.

    Returns:
        (B, r, h, M, d).
    """
    return _RingAttention.apply(q, kv, bias, steps, kernels)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, bias: Tensor, steps: Sequence[RingStep], kernels: str) -> Tensor:
        out = lse = None
        for kv_k, bias_k in pieces_in_turn(steps, (kv, bias)):
            part, part_lse = partial_attention(q, *kv_k.unbind(-2), bias_k, kernels)
            if out is None:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                lse = add_part(out, lse, part, part_lse)
        out = out.to(q.dtype)
        ctx.steps, ctx.kernels = steps, kernels
        ctx.save_for_backward(q, kv, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, kv, bias, out, lse = ctx.saved_tensors
        delta = (grad * out).sum(-1, dtype=lse.dtype)
        dq, dkv, dbias = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv, bias))
        returning: list[Returning] = []
        for (kv_plan, bias_plan), (kv_k, bias_k) in zip(ctx.steps, pieces_in_turn(ctx.steps, (kv, bias))):
            k, v = kv_k.unbind(-2)
            dbias_k = torch.zeros_like(bias_k, dtype=lse.dtype)
            dk, dv = partial_gradients(q, k, v, bias_k, grad, lse, delta, dq, dbias_k, ctx.kernels)
            wait_grads(returning)
            returning = [
                (kv_plan.send_grad(torch.stack([dk, dv], -2)), dkv),
                (bias_plan.send_grad(dbias_k), dbias),
            ]
        wait_grads(returning)
        return dq.to(q.dtype), dkv.to(kv.dtype), dbias.to(bias.dtype), None, None
