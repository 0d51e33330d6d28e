"""The local part of pair-weighted averaging: softmax of logits over the keys, and one product with the values.

Averaging all sequences is one matrix product a head, of weights (M, N) with values (N, S d). Making the weights inside
that product, as kernels of attention do, would gain nothing: all S sequences share them, so they are small, and each
tile of the product would take their exponentials again. On a rank of 2x2 at 3,072 tokens and 1,024 sequences
(M = 1,536, N = 3,072, S = 512, 8 heads of 32 channels, bf16) the weights are 75 MB, written and read in 0.05 ms at
3 TB/s, and the product takes 1.8 ms at 700 TFLOP/s; the exponentials of tiles of 128 columns would take 1.3 ms at
3.6e12 a second. So products are the library's, and what is fused is the softmax: mask, exponentials and rounding read
each logit once and write each weight once, where torch goes over them nine times, mostly in fp32. Its backward pass
reads the weights and their gradients once and writes the gradients of the logits once.

Operations: forward 2 h M N S d, backward twice that and none of the forward product; h M N exponentials each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.work import Work, work

MASKED = 1e6
"""What is taken from the logits of masked keys."""


def has_kernels(logits: Tensor, v: Tensor, kernels: str) -> bool:
    """Whether the fused softmax is used: of any size, but not in fp64."""
    return kernels != "torch" and torch.float64 not in (logits.dtype, v.dtype)


def weighted_average(key_mask: Tensor, logits: Tensor, v: Tensor) -> Tensor:
    """``softmax_j(logits_ij) v_j`` for each head, by torch; differentiable.

    One product a head for all sequences: as one a sequence, torch would copy the weights for each of them.

    Args:
        key_mask: (B, N), 1 for real tokens.
        logits: (B, h, M, N).
        v: (B, h, N, S, d).

    Returns:
        (B, h, M, S, d) in the dtype of ``v``; the softmax is in fp32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = (logits + (key_mask.to(logits.dtype)[:, None, None] - 1) * MASKED).softmax(-1).to(v.dtype)
    return (weights @ v.flatten(3)).unflatten(3, v.shape[3:])


def fused_average(key_mask: Tensor, logits: Tensor, v: Tensor) -> Tensor:
    """As :func:`weighted_average`, with the fused softmax and without gradient."""
    return (_softmax(logits, key_mask, v.dtype) @ v.flatten(3)).unflatten(3, v.shape[3:])


def fused_average_gradients(grad: Tensor, key_mask: Tensor, logits: Tensor, v: Tensor) -> tuple[None, Tensor, Tensor]:
    """Gradients of ``key_mask`` (none), ``logits`` and ``v``, from that of the result of :func:`fused_average`."""
    weights, grad = _softmax(logits, key_mask, v.dtype), grad.to(v.dtype).flatten(3)
    dv = (weights.mT @ grad).unflatten(3, v.shape[3:])
    return None, _softmax_backward(weights, grad @ v.flatten(3).mT, logits.dtype), dv


@torch.library.custom_op("cpfold::masked_softmax", mutates_args=())
def _softmax(logits: Tensor, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over the keys of (B, h, M, N) in fp32, written in ``dtype``."""
    from cpfold_train.kernels.triton import pair_weighted_averaging as kernel

    return kernel.masked_softmax(logits.contiguous(), key_mask.float().contiguous(), MASKED, dtype)


@_softmax.register_fake
def _(logits: Tensor, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


@work("masked_softmax")
def _(logits: Tensor, key_mask: Tensor, dtype: torch.dtype, out: Tensor) -> Work:
    # One exponential for the sum and one for the weight: a row is read twice, the second time from cache.
    return Work(flops=0, exps=2 * logits.numel())


@torch.library.custom_op("cpfold::masked_softmax_backward", mutates_args=())
def _softmax_backward(weights: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``weights * (grad - sum_j weights grad)``, written in ``dtype``."""
    from cpfold_train.kernels.triton import pair_weighted_averaging as kernel

    return kernel.masked_softmax_backward(weights.contiguous(), grad.contiguous(), dtype)


@_softmax_backward.register_fake
def _(weights: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.new_empty(weights.shape, dtype=dtype)


@work("masked_softmax_backward")
def _(weights: Tensor, grad: Tensor, dtype: torch.dtype, out: Tensor) -> Work:
    return Work(flops=0)
