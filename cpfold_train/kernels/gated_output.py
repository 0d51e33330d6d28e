"""The output of triangle multiplication: LayerNorm, projection, gate; with dropout and residual, if these follow.

The fused kernel reads the product x, channels first, and z, and writes the update or, with the residual, the new z: for
tiles of T bytes in bf16 3 T, and 2 x 2c x c operations a pair; torch's form moves about 15 T, dropout and residual 5 T
more.

The backward pass keeps x and z. As in :mod:`cpfold_train.kernels.gated_projection` one kernel makes the gradients of x
and z, and another those of the weights; both project again. The first also writes the normalised z for the second,
which has no registers to normalise both: they move 6 T and 3 T. Stored gradients of projection and gate and a
normalised x too, for cuBLAS, would be 6 T more, for 0.15 TFLOP saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.fused import folded, product_dtype, takes
from cpfold_train.kernels.linear import is_replaced, linear
from cpfold_train.kernels.work import Work, work


def gated_output(
    x: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    p_out: Tensor,
    g_out: Tensor,
    kernels: str,
    residual: bool = False,
    row_factors: Tensor | None = None,
) -> Tensor:
    """``p_out norm_out(x) * sigmoid(g_out norm_in(z))``, times a factor for each row and added to z if asked for.

    Args:
        x: (B, c, r, n), the product.
        z: (B, r, n, c).
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias: (c,).
        p_out, g_out: (c, c) projection and gate.
        kernels: ``torch`` computes a few rows at a time; the others have one kernel for all, which is fused, for the
            tensors that :func:`~cpfold_train.kernels.fused.takes` names, unless linear layers are computed otherwise.
        residual: add z.
        row_factors: (B, r), those of a dropout of rows.

    Returns:
        (B, r, n, c); with the residual in the dtype of z, else under autocast in its dtype.
    """
    if takes(z, z.shape[-1], kernels) and not is_replaced():
        p, g = folded(norm_out_weight, norm_out_bias, p_out), folded(norm_in_weight, norm_in_bias, g_out)
        weight, bias = (torch.cat(both) for both in zip(p, g))
        return torch.ops.cpfold.gated_output(x, z, weight, bias, row_factors, residual, product_dtype(z))
    w = _Weights(norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p_out, g_out)
    rows = rows_per_block(z.shape[0] * z.shape[2] * 4 * z.shape[3] * z.element_size(), z.device)
    update = by_rows(_gated_output, rows, (x.permute(0, 2, 3, 1), z), (w,))
    if row_factors is not None:
        update = update * row_factors[:, :, None, None].to(update.dtype)
    return z + update if residual else update


class _Weights(NamedTuple):
    norm_in_weight: Tensor
    norm_in_bias: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor


def _gated_output(x: Tensor, z: Tensor, w: _Weights) -> Tensor:
    """Rows of the product and of z, (B, r, n, c), to rows of the update."""
    x = layer_norm(x.contiguous(), w.norm_out_weight.shape, w.norm_out_weight, w.norm_out_bias)
    z = layer_norm(z, w.norm_in_weight.shape, w.norm_in_weight, w.norm_in_bias)
    return linear(x, w.p_out) * linear(z, w.g_out).sigmoid()


@torch.library.custom_op("cpfold::gated_output", mutates_args=())
def _forward(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, row_factors: Tensor | None, residual: bool, dtype: torch.dtype
) -> Tensor:
    """``weight`` (2 c, c) and ``bias`` (2 c,): projection of the normalised x, then gate of the normalised z."""
    from cpfold_train.kernels.triton import gated_output as kernels

    pairs = x.contiguous().flatten(2), z.contiguous().flatten(1, 2)
    factors, out_dtype = _of_pairs(row_factors, z), z.dtype if residual else dtype
    return kernels.forward(*pairs, weight.to(dtype), bias, factors, residual, out_dtype).view(z.shape)


@_forward.register_fake
def _(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, row_factors: Tensor | None, residual: bool, dtype: torch.dtype
) -> Tensor:
    return z.new_empty(z.shape, dtype=z.dtype if residual else dtype)


@torch.library.custom_op("cpfold::gated_output_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_factors: Tensor | None,
    residual: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and z; the normalised z, (B, r, n, c) in ``dtype``."""
    from cpfold_train.kernels.triton import gated_output as kernels

    pairs = grad.contiguous().flatten(1, 2), x.contiguous().flatten(2), z.contiguous().flatten(1, 2)
    dx, *found = kernels.backward(*pairs, weight.to(dtype), bias, _of_pairs(row_factors, z), residual)
    dz, normed = (y.view(z.shape) for y in found)
    return dx.view(x.shape), dz, normed


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_factors: Tensor | None,
    residual: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), z.new_empty(z.shape, dtype=dtype)


@torch.library.custom_op("cpfold::gated_output_weights", mutates_args=())
def _weights(
    grad: Tensor, x: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, row_factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    from cpfold_train.kernels.triton import gated_output as kernels

    pairs = grad.contiguous().flatten(1, 2), x.contiguous().flatten(2), normed.flatten(1, 2)
    return kernels.weights(*pairs, weight.to(normed.dtype), bias, _of_pairs(row_factors, normed))


@_weights.register_fake
def _(
    grad: Tensor, x: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, row_factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(bias)


def _of_pairs(row_factors: Tensor | None, z: Tensor) -> Tensor | None:
    """(B, r) to (B, r * n) in fp32: a hundredth of z."""
    return None if row_factors is None else row_factors.float()[:, :, None].expand(z.shape[:3]).flatten(1)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.residual, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor) -> tuple:
    x, z, weight, bias, row_factors = ctx.saved_tensors
    ops = torch.ops.cpfold
    dx, dz, normed = ops.gated_output_backward(grad, x, z, weight, bias, row_factors, ctx.residual, ctx.dtype)
    return dx, dz, *ops.gated_output_weights(grad, x, normed, weight, bias, row_factors), None, None, None


torch.library.register_autograd("cpfold::gated_output", _gradients, setup_context=_keep)


@work("gated_output")
def _(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_factors: Tensor | None,
    residual: bool,
    dtype: torch.dtype,
    out: Tensor,
) -> Work:
    # The weights' cast, the factors of pairs and the kernel.
    return Work(2 * z.numel() * len(weight), z.numel(), x.nbytes + z.nbytes + out.nbytes, 3)


@work("gated_output_backward")
def _(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_factors: Tensor | None,
    residual: bool,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor, Tensor],
) -> Work:
    # Projection and gate once more, and the products with their gradients.
    moved = grad.nbytes + 2 * x.nbytes + 2 * z.nbytes + out[2].nbytes
    return Work(4 * z.numel() * len(weight), z.numel(), moved, 3)


@work("gated_output_weights")
def _(
    grad: Tensor,
    x: Tensor,
    normed: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_factors: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> Work:
    # The same; the weights' cast, the factors of pairs, the kernel and two sums over its parts.
    return Work(4 * grad.numel() * len(weight), grad.numel(), grad.nbytes + x.nbytes + normed.nbytes, 5)
