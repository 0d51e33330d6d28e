"""LayerNorm and a projection to few channels: the logits or the bias that each head of an attention gets from z.

As two operations the norm of a whole tile is written, cast and read again for a result that is a sixteenth of its size.
The fused kernel reads x once and writes what it is projected to; its backward pass reads x and that gradient once,
writes the gradient of x, and sums those of weight and bias in registers. For a tile of T bytes forward T (1 + h / c)
and backward T (2 + h / c), at 2 c h and 4 c h operations a position, far below what the bytes take.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.fused import folded, product_dtype, takes
from cpfold_train.kernels.linear import is_replaced
from cpfold_train.kernels.work import Work, work

WIDEST = 64
"""Channels out, at most, of the fused kernel: the sums of the gradient of the weight lie in registers."""


def normed_projection(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, kernels: str) -> Tensor:
    """``weight @ layer_norm(x)``.

    Args:
        x: (B, rows, ..., c).
        norm_weight, norm_bias: (c,).
        weight: (h, c).
        kernels: ``torch`` computes a few rows at a time; the others have one kernel for all, which is fused, for the
            tensors that :func:`~cpfold_train.kernels.fused.takes` names and at most :data:`WIDEST` channels out, unless
            linear layers are computed otherwise.

    Returns:
        (B, rows, ..., h), under autocast in its dtype.
    """
    if takes(x, x.shape[-1], kernels) and len(weight) <= WIDEST and not is_replaced():
        return _forward(x, *folded(norm_weight, norm_bias, weight), product_dtype(x))
    rows = rows_per_block(x[:, :1].numel() * x.element_size(), x.device)
    return by_rows(_project_rows, rows, (x,), (norm_weight, norm_bias, weight))


def _project_rows(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x.to(norm_weight.dtype), norm_weight.shape, norm_weight, norm_bias), weight)


@torch.library.custom_op("cpfold::normed_projection", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Of (..., c) with mean 0 and variance 1, to (..., h) in ``dtype``."""
    from cpfold_train.kernels.triton import normed_projection as kernel

    return kernel.forward(x.contiguous(), weight.contiguous(), bias, dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)


@work("normed_projection")
def _(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, out: Tensor) -> Work:
    return Work(flops=2 * x.numel() * len(weight))


@torch.library.custom_op("cpfold::normed_projection_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in fp32; products in the dtype of ``grad``."""
    from cpfold_train.kernels.triton import normed_projection as kernel

    return kernel.backward(grad.contiguous(), x.contiguous(), weight.contiguous())


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


@work("normed_projection_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> Work:
    # Two more launches add up what each program found.
    return Work(flops=4 * x.numel() * len(weight), launches=3)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx, grad: Tensor):
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_keep)
