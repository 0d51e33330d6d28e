"""LayerNorm of whole rows in registers; see :mod:`cpfold_train.kernels.layer_norm`.

A program takes as many rows as fill a tile of ``TILE`` elements. In the backward pass a fixed number of programs go
over all tiles, each with sums of its own for the gradients of weight and bias, which are added up at the end: no
atomics, and the same result on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch

TILE = 2048
PROGRAMS = 1024
"""Of the backward pass: some eight a multiprocessor of an H100."""
WARPS = 4


@triton.jit
def _normalised(x_ptr, row, channel, inside, EPS: tl.constexpr, C: tl.constexpr):
    """Rows of x less their mean and divided by their deviation, and 1 / deviation, in fp32."""
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 1)[:, None] / C, 0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / C + EPS)
    return x * scale[:, None], scale


@triton.jit
def forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows (C,) a program: normalised, scaled and shifted."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (channel[None, :] < C)
    x, _ = _normalised(x_ptr, row, channel, inside, EPS, C)
    y = x * tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    at = row[:, None].to(tl.int64) * C + channel[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    beside_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """With g = grad * weight: dx = (g - mean(g) - x mean(g x)) / deviation, x being normalised, and what is beside."""
    channel = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    dbias = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (channel[None, :] < C)
        at = row[:, None].to(tl.int64) * C + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x, scale = _normalised(x_ptr, row, channel, inside, EPS, C)
        dweight += grad * x
        dbias += grad
        g = grad * weight[None, :]
        dx = (g - tl.sum(g, 1)[:, None] / C - x * (tl.sum(g * x, 1)[:, None] / C)) * scale[:, None]
        if beside_ptr is not None:
            dx += tl.load(beside_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    sums = sums_ptr + tl.program_id(0) * 2 * C + channel
    tl.store(sums, tl.sum(dweight, 0), mask=channel < C)
    tl.store(sums + C, tl.sum(dbias, 0), mask=channel < C)


def _tile(c: int) -> dict[str, int]:
    width = triton.next_power_of_2(c)
    return {"ROWS": max(1, TILE // width), "WIDTH": width}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Of contiguous (..., c)."""
    c, out = len(weight), torch.empty_like(x, dtype=dtype)
    tile = _tile(c)
    rows = x.numel() // c
    grid = (triton.cdiv(rows, tile["ROWS"]),)
    has_bias = bias is not None
    forward[grid](x, weight, bias if has_bias else weight, out, rows, c, eps, has_bias, **tile, num_warps=WARPS)
    return out


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, beside: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of contiguous x, with ``beside`` added, of weight and of bias, the latter two in fp32."""
    c, dx = len(weight), torch.empty_like(x)
    tile = _tile(c)
    rows = x.numel() // c
    programs = min(PROGRAMS, triton.cdiv(rows, tile["ROWS"]))
    sums = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    backward[(programs,)](grad, x, weight, beside, dx, sums, rows, c, eps, **tile, num_warps=WARPS)
    dweight, dbias = sums.sum(0)
    return dx, dweight, dbias.clone()


def _launches(c: int, x: str) -> list[Launch]:
    constants = {"C": c, "EPS": 1e-5, **_tile(c)}
    ins, weights = {"x_ptr": x, "weight_ptr": "*fp32", "rows": "i32"}, {"bias_ptr": "*fp32"}
    return [
        Launch(
            f"layer_norm, {c} channels, {x[1:]} to bf16",
            forward,
            ins | weights | {"out_ptr": "*bf16"},
            constants | {"HAS_BIAS": True},
            WARPS,
            1,
        ),
        Launch(
            f"layer_norm backward, {c} channels, {x[1:]}",
            backward,
            ins | {"grad_ptr": "*bf16", "beside_ptr": x, "dx_ptr": x, "sums_ptr": "*fp32"},
            constants,
            WARPS,
            1,
        ),
    ]


LAUNCHES = [launch for c in (64, 128, 384, 768) for x in ("*bf16", "*fp32") for launch in _launches(c, x)]
