"""The local part of the outer product mean: products of all channels of two tokens, their mean, and its projection.

``z_ij = W vec(sum_s a_si b_sj^T) / count_ij + bias``. The sums of all pairs of a block of rows are one matrix product,
(r c, S) with (S, m c), whose result has c * c channels a pair, eight times as many as z: 4.8 GB on a rank of 2x2 at
3,072 tokens. The product is the library's, at the full speed of the matrix units; what follows it is fused. The
projection's kernel takes its operand from where the product has put it, at (i c, j c), so that nothing is reordered,
divides what it has summed, and writes z. In the backward pass one kernel multiplies the gradient with W and writes it
where the products for ``a`` and ``b`` want it, another multiplies it with the sums of products, made again, for the
gradient of W.

Making the sums in the registers of the projection's kernel would save writing and reading them, 3.2 ms of HBM that
partly hides behind 8 ms of products. But a tile of 128 x 256 sums has 32 pairs, for each of which the 256 KB of W would
come from L2: 19 GB, 3.5 ms; and in the backward pass a gradient made in registers would have to be made again for each
block of sequences.

Operations for r m pairs: 2 r m c^2 (S + c_z) forward, three times that backward. Bytes: 4 r m c^2 forward in bf16, for
``OUTER_BYTES`` at a time, and three times that backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.linear import is_replaced, linear
from cpfold_train.kernels.work import Work, work

WIDTHS = (16, 32, 64)
"""Channels c for which there are fused kernels; others take torch's form, and so does fp64."""
MOST_OUT = 128
"""Channels of z, at most, for which there are."""
OUTER_BYTES = 1 << 30
"""Sums of products that the fused kernels have in memory at a time. Each block of rows adds its part of the gradient of
``b`` to a sum in fp32, of 0.2 GB on the rank above with 1,024 sequences: blocks should be few."""


def has_kernels(a: Tensor, weight: Tensor, kernels: str) -> bool:
    """Whether the fused kernels compute it."""
    known = a.shape[-1] in WIDTHS and weight.shape[0] <= MOST_OUT
    return kernels != "torch" and known and a.dtype != torch.float64 and not is_replaced()


def outer_product_mean(a: Tensor, b: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """The projected mean without bias, by torch; differentiable.

    Args:
        a: (B, S, r, c).
        b: (B, S, m, c).
        count: (B, r, m).
        weight: (c_z, c * c).

    Returns:
        (B, r, m, c_z).
    """
    at_once = rows_per_block(b[:, 0].numel() * b.shape[3] * b.element_size(), b.device)
    return by_rows(_mean_rows, at_once, (a.permute(0, 2, 3, 1), count), (b, weight))


def _mean_rows(a: Tensor, count: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Rows a (B, r, c, S) and count (B, r, m), and all columns b (B, S, m, c), to (B, r, m, c_z)."""
    outer = (a.flatten(1, 2) @ b.flatten(2)).unflatten(1, a.shape[1:3]).unflatten(3, b.shape[2:])
    outer = outer.transpose(2, 3).flatten(3)
    return linear(outer / count[..., None].to(outer.dtype), weight)


def fused_mean(a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`outer_product_mean`, with bias, by the fused kernels and without gradient, in the dtype of ``a``.

    Args:
        bias: (c_z,), or None.
    """
    out = a.new_empty(*count.shape, weight.shape[0])
    weight, b = weight.to(a.dtype), b.flatten(2)
    for rows in _row_blocks(a, count):
        out[:, rows] = _project(a[:, :, rows].flatten(2).mT @ b, count[:, rows], weight, bias)
    return out


def fused_mean_gradients(
    grad: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a`` in its dtype, and of ``b`` and ``weight`` in fp32, from that of :func:`fused_mean`."""
    da, db = torch.empty_like(a), torch.zeros_like(b, dtype=torch.float32)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    weight = weight.to(a.dtype)
    for rows in _row_blocks(a, count):
        a_rows = a[:, :, rows].flatten(2)
        mean_grad = torch.empty_like(grad[:, rows], dtype=a.dtype)
        torch.div(grad[:, rows], count[:, rows, :, None], out=mean_grad)
        dweight += _weight_gradient(a_rows.mT @ b.flatten(2), mean_grad)
        outer_grad = _unproject(mean_grad, weight)
        da[:, :, rows] = (b.flatten(2) @ outer_grad.mT).unflatten(2, (-1, a.shape[3]))
        db += (a_rows @ outer_grad).unflatten(2, b.shape[2:])
        # Not beside the next block's.
        del outer_grad
    return da, db, dweight


def _row_blocks(a: Tensor, count: Tensor) -> Iterator[slice]:
    """Equal blocks of rows, with as many sums of products as ``OUTER_BYTES`` hold."""
    rows, a_row = count.shape[1], count[:, 0].numel() * a.shape[3] ** 2 * a.element_size()
    blocks = -(-rows // max(1, OUTER_BYTES // a_row))
    step = -(-rows // blocks)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


@torch.library.custom_op("cpfold::outer_project", mutates_args=())
def _project(outer: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sums of products (B, r c, m c), and count (B, r, m), to (B, r, m, c_z)."""
    from cpfold_train.kernels.triton import outer_product_mean as kernel

    return kernel.project(outer.contiguous(), count.float().contiguous(), weight.contiguous(), bias)


@_project.register_fake
def _(outer: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return outer.new_empty(*count.shape, weight.shape[0])


@work("outer_project")
def _(outer: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Work:
    return Work(flops=2 * count.numel() * weight.numel())


@torch.library.custom_op("cpfold::outer_unproject", mutates_args=())
def _unproject(mean_grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the mean's projection, divided by count (B, r, m, c_z), to that of the sums (B, r c, m c)."""
    from cpfold_train.kernels.triton import outer_product_mean as kernel

    return kernel.unproject(mean_grad.contiguous(), weight.contiguous())


@_unproject.register_fake
def _(mean_grad: Tensor, weight: Tensor) -> Tensor:
    (batch, rows, cols, _), c = mean_grad.shape, width(weight)
    return mean_grad.new_empty(batch, rows * c, cols * c)


@work("outer_unproject")
def _(mean_grad: Tensor, weight: Tensor, out: Tensor) -> Work:
    return Work(flops=2 * out.numel() * weight.shape[0])


@torch.library.custom_op("cpfold::outer_weight_gradient", mutates_args=())
def _weight_gradient(outer: Tensor, mean_grad: Tensor) -> Tensor:
    """Gradient of the weight (c_z, c * c) in fp32, from the sums (B, r c, m c) and what ``_unproject`` takes."""
    from cpfold_train.kernels.triton import outer_product_mean as kernel

    return kernel.weight_gradient(outer.contiguous(), mean_grad.contiguous())


@_weight_gradient.register_fake
def _(outer: Tensor, mean_grad: Tensor) -> Tensor:
    c = outer.shape[1] // mean_grad.shape[1]
    return outer.new_empty(mean_grad.shape[3], c * c, dtype=torch.float32)


@work("outer_weight_gradient")
def _(outer: Tensor, mean_grad: Tensor, out: Tensor) -> Work:
    # The second launch adds up what each program found.
    return Work(flops=2 * outer.numel() * mean_grad.shape[3], launches=2)


def width(weight: Tensor) -> int:
    """c, from a weight (c_z, c * c)."""
    return round(weight.shape[1] ** 0.5)
