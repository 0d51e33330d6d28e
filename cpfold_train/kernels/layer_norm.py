"""LayerNorm over the last dim, read once and written once in the dtype that the next product takes.

Under autocast torch's LayerNorm writes fp32, which every product that follows casts by itself. The fused kernel reads a
row of any float dtype, holds it in registers for its mean and variance, and writes it as the product takes it; the
backward pass has the statistics from the row itself, which it reads anyway. Bytes for n elements: forward n of x in and
n of the result out; backward n of x and n of the gradient in, n of the gradient of x out, and n of a gradient that is
added to it. No matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpfold_train.kernels.work import Work, work

EPS = 1e-5
WIDEST = 2048
"""Channels of a row that registers hold; wider rows take torch's LayerNorm, and so does fp64."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str, dtype: torch.dtype | None = None
) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-5) * weight + bias``, statistics in fp32 at least.

    Args:
        x: (..., c), any float dtype.
        weight: (c,).
        bias: (c,), or None.
        kernels: ``torch``, ``triton`` or ``cuequivariance``.
        dtype: of the result; None is that of ``x``.

    Returns:
        (..., c).
    """
    dtype = dtype or x.dtype
    if _takes_torch(x, weight, kernels):
        return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, EPS).to(dtype)
    return _forward(x, weight, bias, dtype)


def layer_norm_beside(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm`, and x for what reads it besides, such as a residual: the kernel adds the gradient of that to
    its own, which else were three passes over a tile."""
    if _takes_torch(x, weight, kernels):
        return layer_norm(x, weight, bias, kernels, dtype), x
    return _Beside.apply(x, weight, bias, dtype)


def _takes_torch(x: Tensor, weight: Tensor, kernels: str) -> bool:
    return kernels == "torch" or torch.float64 in (x.dtype, weight.dtype) or len(weight) > WIDEST


@torch.library.custom_op("cpfold::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from cpfold_train.kernels.triton import layer_norm as kernel

    return kernel.layer_norm(x.contiguous(), weight, bias, EPS, dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@work("layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor) -> Work:
    return Work(flops=0)


@torch.library.custom_op("cpfold::layer_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, with ``beside`` added to it, and in fp32 of weight and bias."""
    from cpfold_train.kernels.triton import layer_norm as kernel

    beside = None if beside is None else beside.contiguous()
    return kernel.layer_norm_backward(grad.contiguous(), x.contiguous(), weight, beside, EPS)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    acc_dtype = torch.float32
    return x.new_empty(x.shape), torch.empty_like(weight, dtype=acc_dtype), torch.empty_like(weight, dtype=acc_dtype)


@work("layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, beside: Tensor | None, out: tuple[Tensor, Tensor, Tensor]) -> Work:
    # The second launch adds up what each program found for weight and bias.
    return Work(flops=0, launches=2)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad: Tensor, beside: Tensor | None = None):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _backward(grad, x, weight, beside)
    return dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


_forward.register_autograd(_gradients, setup_context=_keep)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Where nothing reads x besides, nothing is added.
        ctx.set_materialize_grads(False)
        _keep(ctx, (x, weight, bias, dtype), x)
        return _forward(x, weight, bias, dtype), x

    backward = staticmethod(_gradients)
