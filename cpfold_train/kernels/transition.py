"""The transition (AlphaFold 3, Algorithm 11): LayerNorm and SwiGLU, with the residual if that follows.

The fused kernel goes through the wide hidden channels a few at a time, so that they are never in memory (as attention
does with scores): it reads x and writes the result, 2 T for tiles of T bytes, at 6 c h operations a position, by which
it is bound (0.93 TFLOP at 3,072 tokens on 2x2, 1.3 ms at 700 TFLOP/s).

The backward pass keeps x alone and has two kernels. Both compute the hidden channels and their gradient again, 6 c h
operations. The first then makes the gradient of x, 4 c h more; it also writes the normalised x, and dy where that is
not in the dtype of the products, for the second: 4 T (8 T with x in fp32). The second goes through all positions for
some hidden channels and makes the gradients of the weights, 6 c h more; it moves 2 T, because the programs that share
positions run side by side and read them from L2. Stored, what the second computes again would be 12 T written and read:
4.8 ms for 1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import layer_norm

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.fused import folded, product_dtype, takes
from cpfold_train.kernels.linear import is_replaced, linear
from cpfold_train.kernels.regions import region
from cpfold_train.kernels.work import Work, work

HIDDEN = 64
"""Of hidden channels the kernel takes a multiple of this at a time, or fewer than this if they are a power of two."""


def transition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fc3: Tensor,
    kernels: str,
    residual: bool = False,
) -> Tensor:
    """``fc3(silu(fc1(norm(x))) * fc2(norm(x)))``, added to x if asked for.

    Args:
        x: (B, rows, ..., c).
        norm_weight, norm_bias: (c,).
        fc1, fc2: (h, c).
        fc3: (c, h).
        kernels: ``torch`` computes a few rows at a time; the others have one kernel for all, which is fused, for the
            tensors that :func:`~cpfold_train.kernels.fused.takes` names and h a multiple of 64 or 16 or 32, unless
            linear layers are computed otherwise.
        residual: add x.

    Returns:
        As x; without the residual under autocast in its dtype.
    """
    hidden = len(fc1)
    if takes(x, x.shape[-1], kernels) and (hidden % HIDDEN == 0 or hidden in (16, 32)) and not is_replaced():
        weight, bias = folded(norm_weight, norm_bias, fc1, fc2)
        return torch.ops.cpfold.transition(x, weight, bias, fc3, residual, product_dtype(x))
    rows = rows_per_block(x[:, :1].numel() // x.shape[-1] * hidden * x.element_size(), x.device)
    update = by_rows(transition_at_once, rows, (x,), (norm_weight, norm_bias, fc1, fc2, fc3))
    return x + update if residual else update


@region
def transition_at_once(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1: Tensor, fc2: Tensor, fc3: Tensor
) -> Tensor:
    """Torch's form of :func:`transition` of (..., c), its intermediates as they come."""
    x = layer_norm(x, norm_weight.shape, norm_weight, norm_bias)
    return linear(F.silu(linear(x, fc1)) * linear(x, fc2), fc3)


@torch.library.custom_op("cpfold::transition", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, residual: bool, dtype: torch.dtype) -> Tensor:
    """``weight`` (2 h, c) and ``bias`` (2 h,): fc1, then fc2, of the normalised x."""
    from cpfold_train.kernels.triton import transition as kernels

    flat, fc3 = x.reshape(-1, x.shape[-1]), fc3.T.to(dtype).contiguous()
    return kernels.forward(flat, weight.to(dtype), bias, fc3, residual, x.dtype if residual else dtype).view(x.shape)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, residual: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual else dtype)


@torch.library.custom_op("cpfold::transition_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, residual: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x; the normalised x in ``dtype``; ``grad`` in ``dtype`` too, empty where it is so already."""
    from cpfold_train.kernels.triton import transition as kernels

    flat = grad.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
    dx, normed, cast = kernels.backward(*flat, weight.to(dtype), bias, fc3.T.to(dtype).contiguous(), residual)
    return dx.view(x.shape), normed, cast


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, residual: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.numel() // x.shape[-1], x.shape[-1]
    cast = x.new_empty(0 if grad.dtype == dtype else flat, dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(flat, dtype=dtype), cast


@torch.library.custom_op("cpfold::transition_weights", mutates_args=())
def _weights(grad: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``grad`` and ``normed`` (P, c) in the dtype of the products."""
    from cpfold_train.kernels.triton import transition as kernels

    dtype = normed.dtype
    dweight, dbias, dfc3 = kernels.weights(grad, normed, weight.to(dtype), bias, fc3.T.to(dtype).contiguous())
    return dweight, dbias, dfc3.T.to(fc3.dtype, memory_format=torch.contiguous_format)


@_weights.register_fake
def _(grad: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(fc3)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.residual, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor) -> tuple:
    x, weight, bias, fc3 = ctx.saved_tensors
    ops = torch.ops.cpfold
    dx, normed, cast = ops.transition_backward(grad, x, weight, bias, fc3, ctx.residual, ctx.dtype)
    narrow = cast if cast.numel() else grad.reshape(normed.shape)
    return dx, *ops.transition_weights(narrow, normed, weight, bias, fc3), None, None


torch.library.register_autograd("cpfold::transition", _gradients, setup_context=_keep)


@work("transition")
def _(x: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, residual: bool, dtype: torch.dtype, out: Tensor) -> Work:
    # Casts and transpose of the weights, and the kernel.
    hidden = x.numel() // fc3.shape[0] * fc3.shape[1]
    return Work(6 * fc3.shape[0] * hidden, hidden, x.nbytes + out.nbytes, 4)


@work("transition_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    fc3: Tensor,
    residual: bool,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor, Tensor],
) -> Work:
    # Hidden channels and their gradient, and two products with that.
    hidden = x.numel() // fc3.shape[0] * fc3.shape[1]
    return Work(10 * fc3.shape[0] * hidden, hidden, grad.nbytes + x.nbytes + sum(y.nbytes for y in out), 4)


@work("transition_weights")
def _(
    grad: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, fc3: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> Work:
    # The same and three products; casts and transpose of the weights, the kernel, three sums, the transpose back.
    hidden = normed.shape[0] * fc3.shape[1]
    return Work(12 * fc3.shape[0] * hidden, hidden, grad.nbytes + normed.nbytes, 8)
