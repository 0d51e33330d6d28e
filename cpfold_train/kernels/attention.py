"""Local attention with an additive bias to all keys, without ever holding the scores.

In plain torch it is :mod:`cpfold_train.kernels.blockwise_attention`. On GPUs it is one operator
(:mod:`cpfold_train.kernels.attention_operators`), or the cuEquivariance package's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels import attention_operators
from cpfold_train.kernels.blockwise_attention import blockwise_attention, blockwise_gradients
from cpfold_train.kernels.kept import kept


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernels: str = "torch") -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head on its own; the softmax is in fp32 at least.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked.
        kernels: ``torch``, ``triton`` or ``cuequivariance``. fp64 always takes torch's form, and what the package of
            cuEquivariance has no kernel for (:func:`in_cuequivariance`) takes Triton's, which are for heads of width 64
            at most; wider ones take torch's.

    Returns:
        (B, r, h, M, d).
    """
    chosen = _chosen(kernels, q)
    if chosen == "cuequivariance":
        from cuequivariance_torch import triangle_attention

        return triangle_attention(q, k, v, bias[:, None], scale=1.0)
    if chosen == "triton":
        return _Fused.apply(bias, q.transpose(2, 3)[:, :, :, None], torch.stack([k, v], 3).transpose(2, 4))
    return _BiasedAttention.apply(q, k, v, bias)


def gated_attention(qg: Tensor, kv: Tensor | None, bias: Tensor, kernels: str) -> Tensor:
    """:func:`biased_attention` times ``sigmoid(g_i)``, of what the projections give and for the one that follows.

    Args:
        qg: (B, r, M, 2, h, d) queries, already scaled, and gates.
        kv: (B, r, N, 2, h, d) keys and values; None where ``qg`` (B, r, N, 4, h, d) has them too.
        bias, kernels: as for :func:`biased_attention`.

    Returns:
        (B, r, M, h, d).
    """
    given = (qg,) if kv is None else (qg, kv)
    if _chosen(kernels, _by_head(qg)[0]) == "triton":
        return _Fused.apply(bias, *given).transpose(2, 3)
    q, g, k, v = (part for x in given for part in x.permute(3, 0, 1, 4, 2, 5).contiguous())
    return (biased_attention(q, k, v, bias, kernels) * g.sigmoid()).transpose(2, 3)


def is_fused(kernels: str, q: Tensor) -> bool:
    """Whether attention with queries like ``q`` may run in Triton's kernels, which hold no scores."""
    return kernels != "torch" and attention_operators.supports(q.dtype, q.shape[-1])


def in_cuequivariance(q: Tensor) -> bool:
    """Whether ``triangle_attention`` of cuEquivariance 0.13 has a kernel for queries (B, r, h, M, d) like ``q``.

    For few queries, fp32 wider than 32 and odd widths it falls back to plain torch, with all scores in memory. It takes
    what autocast says, not the tensors' dtype. Its kernels are for CUDA; on a GPU before Blackwell they are those for
    Ampere, with the bias in fp32.
    """
    dtype, width = q.dtype, q.shape[4]
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    fits = width <= 128 and width % 8 == 0 if dtype != torch.float32 else width <= 32 and width % 4 == 0
    return fits and dtype != torch.float64 and q.shape[3] > (100 if width >= 32 else 200)


def _chosen(kernels: str, q: Tensor) -> str:
    if kernels == "cuequivariance" and in_cuequivariance(q):
        return kernels
    return "triton" if is_fused(kernels, q) else "torch"


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (blockwise_attention(q, k, v, bias, with_lse=False)[0],)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return kept(_attended, q, k, v, bias)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias = ctx.saved_tensors
        dq, dbias = torch.zeros_like(q), torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        dk, dv = blockwise_gradients(q, k, v, bias, grad, dq, dbias)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype)


class _Fused(torch.autograd.Function):
    """Of the bias; and of queries, perhaps with gates (B, r, M, 1 or 2, h, d), and keys and values (B, r, N, 2, h, d),
    or of all of them in one tensor.

    Gradients are written where queries, gates, keys and values are read, in tensors of the form of the inputs: nothing
    is laid out otherwise, neither forward nor backward.
    """

    @staticmethod
    def forward(ctx, bias: Tensor, *given: Tensor) -> Tensor:
        q, *gate, k, v = _by_head(*given)
        out, lse = kept(torch.ops.cpfold.attention, q, k, v, bias, *gate or [None])
        ctx.save_for_backward(bias, out, lse, *given)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        bias, out, lse, *given = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in given]
        dbias = torch.zeros_like(bias, dtype=torch.float32, memory_format=torch.contiguous_format)
        (q, *gate, k, v), (dq, *dgate, dk, dv) = _by_head(*given), _by_head(*grads)
        delta, before = torch.ops.cpfold.attention_delta(grad, out, *gate or [None], *dgate or [None])
        before = before if gate else grad
        torch.ops.cpfold.attention_backward(q, k, v, bias, before, lse, delta, dq, dk, dv, dbias, False)
        return dbias.to(bias.dtype), *grads


def _by_head(*tensors: Tensor) -> list[Tensor]:
    """Views (B, r, h, n, d) of the parts of some (B, r, n, parts, h, d)."""
    return [part.transpose(2, 3) for x in tensors for part in x.unbind(3)]
