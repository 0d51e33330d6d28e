"""The input of triangle multiplication: LayerNorm, projections, gates and mask, written channels first.

The fused kernel reads z once and writes a and b once, as the messages and the batched product want them. For a tile of
T bytes in bf16 that is 3 T (4 T with z in fp32) and 2 x 4c x c operations a pair; torch's form moves about 25 T.

The backward pass keeps z and the mask alone and has two kernels, which both compute the projections again. The first
goes through all channels of some pairs for the gradient of z; it moves 4 T. The second goes through all pairs for some
channels for the gradient of the weights; it moves 3 T, because the programs that share pairs run side by side and read
z from L2. The gradient of the weights could also come from stored gradients of both projections, by cuBLAS. But these
are 4 T written and 4 T read, and the normalised z 2 T: 2 ms at 3,072 tokens on 2x2, where projecting a second time is
0.31 TFLOP, 0.45 ms. A sum in the first kernel would need 256 KB of accumulators a multiprocessor, all its registers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.fused import folded, product_dtype, takes
from cpfold_train.kernels.work import Work, work


def gated_projection(
    z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, p_in: Tensor, g_in: Tensor, kernels: str
) -> Tensor:
    """``p_in norm(z) * sigmoid(g_in norm(z)) * mask``, channels first.

    Args:
        z: (B, r, n, c).
        mask: (B, r, n).
        norm_weight, norm_bias: (c,).
        p_in, g_in: (o, c) projection and gate.
        kernels: ``torch`` computes a few rows at a time; the others have one kernel for all, which is fused, for the
            tensors that :func:`~cpfold_train.kernels.fused.takes` names, if o is one of the widths there or twice one.

    Returns:
        (B, o, r, n); under autocast in its dtype, else in that of z.
    """
    if takes(z, z.shape[-1], kernels):
        weight, bias = folded(norm_weight, norm_bias, p_in, g_in)
        return torch.ops.cpfold.gated_projection(z, mask, weight, bias, product_dtype(z))
    rows = rows_per_block(z.shape[0] * z.shape[2] * 2 * len(p_in) * z.element_size(), z.device)
    return by_rows(_project, rows, (z, mask), (norm_weight, norm_bias, p_in, g_in), dim=2)


def gated_projection_beside(
    z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, p_in: Tensor, g_in: Tensor, kernels: str
) -> tuple[Tensor, Tensor]:
    """:func:`gated_projection`, and z for what reads it besides: the fused kernel adds the gradient of that to its own,
    which else were three passes over a tile."""
    if takes(z, z.shape[-1], kernels):
        weight, bias = folded(norm_weight, norm_bias, p_in, g_in)
        return _Beside.apply(z, mask, weight, bias, product_dtype(z))
    return gated_projection(z, mask, norm_weight, norm_bias, p_in, g_in, kernels), z


def _project(z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, p_in: Tensor, g_in: Tensor) -> Tensor:
    x = layer_norm(z, norm_weight.shape, norm_weight, norm_bias)
    p, g = (torch.cat([p_in, g_in]) @ x.flatten(1, 2).mT).unflatten(2, z.shape[1:3]).chunk(2, 1)
    return p * g.sigmoid() * mask[:, None].to(p.dtype)


@torch.library.custom_op("cpfold::gated_projection", mutates_args=())
def _forward(z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` (2 o, c) and ``bias`` (2 o,), projections first and then gates, of the normalised z."""
    from cpfold_train.kernels.triton import gated_projection as kernels

    pairs, masks = z.contiguous().flatten(1, 2), mask.contiguous().flatten(1)
    return kernels.forward(pairs, masks, weight.to(dtype), bias).unflatten(2, z.shape[1:3])


@_forward.register_fake
def _(z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return z.new_empty(z.shape[0], len(weight) // 2, *z.shape[1:3], dtype=dtype)


@torch.library.custom_op("cpfold::gated_projection_backward", mutates_args=())
def _backward(
    grad: Tensor,
    z: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    beside: Tensor | None,
) -> Tensor:
    """The gradient of z, with ``beside`` added to it."""
    from cpfold_train.kernels.triton import gated_projection as kernels

    pairs, masks = z.contiguous().flatten(1, 2), mask.contiguous().flatten(1)
    beside = None if beside is None else beside.contiguous()
    return kernels.backward(grad.contiguous().flatten(2), pairs, masks, weight.to(dtype), bias, beside).view(z.shape)


@_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    beside: Tensor | None,
) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.custom_op("cpfold::gated_projection_weights", mutates_args=())
def _weights(
    grad: Tensor, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from cpfold_train.kernels.triton import gated_projection as kernels

    pairs, masks = z.contiguous().flatten(1, 2), mask.contiguous().flatten(1)
    return kernels.weights(grad.contiguous().flatten(2), pairs, masks, weight.to(dtype), bias)


@_weights.register_fake
def _(grad: Tensor, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor, beside: Tensor | None = None) -> tuple:
    args = grad, *ctx.saved_tensors, ctx.dtype
    dz = torch.ops.cpfold.gated_projection_backward(*args, beside)
    return dz, None, *torch.ops.cpfold.gated_projection_weights(*args), None


torch.library.register_autograd("cpfold::gated_projection", _gradients, setup_context=_keep)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        # Where nothing reads z besides, nothing is added.
        ctx.set_materialize_grads(False)
        _keep(ctx, (z, mask, weight, bias, dtype), z)
        return _forward(z, mask, weight, bias, dtype), z

    backward = staticmethod(_gradients)


@work("gated_projection")
def _(z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, out: Tensor) -> Work:
    # The weights' cast and the kernel.
    return Work(2 * mask.numel() * weight.numel(), out.numel(), z.nbytes + mask.nbytes + out.nbytes, 2)


@work("gated_projection_backward")
def _(
    grad: Tensor,
    z: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    beside: Tensor | None,
    out: Tensor,
) -> Work:
    # Projections and gates once more, and the products with their gradients.
    tiles = 2 if beside is None else 3
    return Work(4 * mask.numel() * weight.numel(), grad.numel(), tiles * z.nbytes + mask.nbytes + grad.nbytes, 2)


@work("gated_projection_weights")
def _(
    grad: Tensor, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, out: tuple[Tensor, ...]
) -> Work:
    # The same; the weights' cast, the kernel and two sums over its parts.
    return Work(4 * mask.numel() * weight.numel(), grad.numel(), z.nbytes + mask.nbytes + grad.nbytes, 4)
