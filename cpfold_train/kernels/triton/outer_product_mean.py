"""Kernels between z and the sums of products of channels; see :mod:`cpfold_train.kernels.outer_product_mean`.

The sums lie at (i c, j c), as a matrix product leaves them: channel (c', d) of pair (i, j) is in row i c + c' and
column j c + d. For one c', the channels d of all pairs of a row i are one stretch of memory. So a tile of pairs of one
row and of some channels is read and written where it lies, in whole sectors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch
from cpfold_train.kernels.triton.tile import dot_constants, parts

PROJECT = {"PAIRS": 128, "CHANNELS": 64}, 8, 3
UNPROJECT = {"PAIRS": 128, "CHANNELS": 64}, 4, 2
WEIGHT = {"PAIRS": 64, "CHANNELS": 128}, 8, 3
WIDE = {"PAIRS": 64, "CHANNELS": 32}, 8, 2
"""Tiles, warps and stages: of each kernel in bf16, and of all of them in fp32, where less fits registers."""


@triton.jit
def _outer_at(row, pair, channel, cols, C: tl.constexpr):
    """Where channels (c', d) of pairs (row, pair) are."""
    line = (row * C + channel // C).to(tl.int64) * (cols * C)
    return line + pair * C + channel % C


@triton.jit
def project_kernel(
    outer_ptr,
    count_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    cols,
    C: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the result for PAIRS pairs of a row, summed over c' and d, CHANNELS at a time."""
    tiles = tl.cdiv(cols, PAIRS)
    row, pair = tl.program_id(0) // tiles, tl.program_id(0) % tiles * PAIRS + tl.arange(0, PAIRS)
    o = tl.arange(0, WIDTH)
    total = tl.zeros([PAIRS, WIDTH], tl.float32)
    for first in range(0, C * C, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        sums = tl.load(
            outer_ptr + _outer_at(row, pair[:, None], k[None, :], cols, C), mask=pair[:, None] < cols, other=0.0
        )
        weight = tl.load(weight_ptr + o[None, :] * (C * C) + k[:, None], mask=o[None, :] < OUT, other=0.0)
        total = tl.dot(sums.to(DOT), weight.to(DOT), total, input_precision=PRECISION)
    here = row.to(tl.int64) * cols + pair
    total /= tl.load(count_ptr + here, mask=pair < cols, other=1.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    inside = (pair[:, None] < cols) & (o[None, :] < OUT)
    tl.store(out_ptr + here[:, None] * OUT + o[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unproject_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    cols,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: all channels of PAIRS pairs of a row, CHANNELS at a time; the gradient is read once."""
    tiles = tl.cdiv(cols, PAIRS)
    row, pair = tl.program_id(0) // tiles, tl.program_id(0) % tiles * PAIRS + tl.arange(0, PAIRS)
    o = tl.arange(0, WIDTH)
    here = row.to(tl.int64) * cols + pair
    inside = (pair[:, None] < cols) & (o[None, :] < OUT)
    grad = tl.load(grad_ptr + here[:, None] * OUT + o[None, :], mask=inside, other=0.0).to(DOT)
    for first in range(0, C * C, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        weight = tl.load(weight_ptr + o[:, None] * (C * C) + k[None, :], mask=o[:, None] < OUT, other=0.0)
        out = tl.dot(grad, weight.to(DOT), input_precision=PRECISION)
        at = _outer_at(row, pair[:, None], k[None, :], cols, C)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=pair[:, None] < cols)


@triton.jit
def weight_kernel(
    outer_ptr,
    grad_ptr,
    sums_ptr,
    rows,
    cols,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: CHANNELS channels (c', d) of the gradient, transposed, summed over every n-th tile of PAIRS pairs.

    Programs of the same tiles are neighbours, so that z's gradient comes from L2 for all of them but one.
    """
    k = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    o = tl.arange(0, WIDTH)
    total = tl.zeros([CHANNELS, WIDTH], tl.float32)
    tiles = tl.cdiv(cols, PAIRS)
    for tile in range(tl.program_id(1), rows * tiles, tl.num_programs(1)):
        row, pair = tile // tiles, tile % tiles * PAIRS + tl.arange(0, PAIRS)
        sums = tl.load(
            outer_ptr + _outer_at(row, pair[:, None], k[None, :], cols, C), mask=pair[:, None] < cols, other=0.0
        )
        at = (row.to(tl.int64) * cols + pair[:, None]) * OUT + o[None, :]
        grad = tl.load(grad_ptr + at, mask=(pair[:, None] < cols) & (o[None, :] < OUT), other=0.0)
        total = tl.dot(tl.trans(sums.to(DOT)), grad.to(DOT), total, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * C * C + k[:, None]) * OUT + o[None, :]
    tl.store(sums_ptr + at, total, mask=o[None, :] < OUT)


def _constants(c: int, out: int, dtype: torch.dtype, tile: dict[str, int]) -> dict[str, Any]:
    # Products have at least 16 columns.
    return {"C": c, "OUT": out, "WIDTH": max(16, triton.next_power_of_2(out)), **tile, **dot_constants(dtype)}


def project(outer: Tensor, count: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Contiguous (B, r c, m c) and (B, r, m) to (B, r, m, c_z), in the dtype of the former."""
    (batch, rows, cols), width = count.shape, weight.shape[0]
    out = outer.new_empty(batch, rows, cols, width)
    tile, warps, stages = PROJECT if outer.itemsize == 2 else WIDE
    project_kernel[(batch * rows * triton.cdiv(cols, tile["PAIRS"]),)](
        outer,
        count,
        weight,
        weight if bias is None else bias,
        out,
        cols,
        HAS_BIAS=bias is not None,
        **_constants(outer.shape[1] // rows, width, outer.dtype, tile),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def unproject(grad: Tensor, weight: Tensor) -> Tensor:
    """Contiguous (B, r, m, c_z) to (B, r c, m c), in the dtype of ``grad``."""
    (batch, rows, cols, width), c = grad.shape, round(weight.shape[1] ** 0.5)
    out = grad.new_empty(batch, rows * c, cols * c)
    tile, warps, stages = UNPROJECT if grad.itemsize == 2 else WIDE
    unproject_kernel[(batch * rows * triton.cdiv(cols, tile["PAIRS"]),)](
        grad, weight, out, cols, **_constants(c, width, grad.dtype, tile), num_warps=warps, num_stages=stages
    )
    return out


def weight_gradient(outer: Tensor, grad: Tensor) -> Tensor:
    """Contiguous (B, r c, m c) and (B, r, m, c_z) to (c_z, c * c) in fp32."""
    (batch, rows, cols, width), c = grad.shape, outer.shape[1] // grad.shape[1]
    tile, warps, stages = WEIGHT if outer.itemsize == 2 else WIDE
    slices = triton.cdiv(c * c, tile["CHANNELS"])
    # Two programs fit on a multiprocessor.
    splits = 2 * parts(grad.device, slices, batch * rows * triton.cdiv(cols, tile["PAIRS"]))
    sums = outer.new_empty(splits, c * c, width, dtype=torch.float32)
    weight_kernel[(slices, splits)](
        outer,
        grad,
        sums,
        batch * rows,
        cols,
        **_constants(c, width, grad.dtype, tile),
        num_warps=warps,
        num_stages=stages,
    )
    return sums.sum(0).T


def _launches() -> list[Launch]:
    """Boltz-2's 32 channels of a and b, and 128 of z."""
    cols, wide = {"cols": "i32"}, dict.fromkeys(("count_ptr", "bias_ptr", "sums_ptr"), "*fp32")
    types = dict.fromkeys(("outer_ptr", "weight_ptr", "grad_ptr", "out_ptr"), "*bf16") | wide | cols | {"rows": "i32"}
    found = []
    for kernel, (tile, warps, stages) in (
        (project_kernel, PROJECT),
        (unproject_kernel, UNPROJECT),
        (weight_kernel, WEIGHT),
    ):
        constants = _constants(32, 128, torch.bfloat16, tile)
        if kernel is project_kernel:
            constants["HAS_BIAS"] = True
        taken = {name: of for name, of in types.items() if name in kernel.arg_names}
        found.append(Launch(f"outer product mean, {kernel.__name__}", kernel, taken, constants, warps, stages))
    return found


LAUNCHES = _launches()
