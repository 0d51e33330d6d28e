"""Triton's kernels of :mod:`cpfold_train.kernels.normed_projection`.

x is (P, C), the weight (OUT, C) and what is written (P, OUT). Products have at least 16 rows and columns, so that OUT
channels are padded to WIDTH in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch
from cpfold_train.kernels.triton.tile import dot_constants, normalise, normalise_backward, parts

FORWARD = {"BM": 64}, 4, 1
BACKWARD = {"BM": 32}, 4, 2
"""Positions at a time, warps and stages."""
PER_PROCESSOR = 3
"""Programs of the backward pass for each multiprocessor."""


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, P, C: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM positions."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    o = tl.arange(0, WIDTH)
    at = m[:, None].to(tl.int64)
    x = tl.load(x_ptr + at * C + c[None, :], mask=m[:, None] < P, other=0.0).to(tl.float32)
    x, _ = normalise(x, C, 1)
    w = tl.load(w_ptr + o[:, None] * C + c[None, :], mask=o[:, None] < OUT, other=0.0).to(DOT)
    y = tl.dot(x.to(DOT), tl.trans(w), input_precision=PRECISION)
    y += tl.load(b_ptr + o, mask=o < OUT, other=0.0)[None, :]
    inside = (m[:, None] < P) & (o[None, :] < OUT)
    tl.store(out_ptr + at * OUT + o[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, db_ptr, P, C: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every n-th block of BM positions, and its part of the gradients of weight and bias."""
    c = tl.arange(0, C)
    o = tl.arange(0, WIDTH)
    w = tl.load(w_ptr + o[:, None] * C + c[None, :], mask=o[:, None] < OUT, other=0.0).to(DOT)
    dw = tl.zeros([WIDTH, C], tl.float32)
    db = tl.zeros([WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(P, BM), tl.num_programs(0)):
        m = block * BM + tl.arange(0, BM)
        at = m[:, None].to(tl.int64)
        inside = (m[:, None] < P) & (o[None, :] < OUT)
        grad = tl.load(grad_ptr + at * OUT + o[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + at * C + c[None, :], mask=m[:, None] < P, other=0.0).to(tl.float32)
        x, scale = normalise(x, C, 1)
        db += tl.sum(grad.to(tl.float32), 0)
        grad = grad.to(DOT)
        dw = tl.dot(tl.trans(grad), x.to(DOT), dw, input_precision=PRECISION)
        dx = normalise_backward(tl.dot(grad, w, input_precision=PRECISION), x, scale, C, 1)
        tl.store(dx_ptr + at * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=m[:, None] < P)
    part = tl.program_id(0)
    tl.store(dw_ptr + (part * OUT + o[:, None]) * C + c[None, :], dw, mask=o[:, None] < OUT)
    tl.store(db_ptr + part * OUT + o, db, mask=o < OUT)


def _constants(c: int, out: int, dtype: torch.dtype, tile: dict[str, int]) -> dict[str, Any]:
    return {"C": c, "OUT": out, "WIDTH": max(16, triton.next_power_of_2(out)), **tile, **dot_constants(dtype)}


def forward(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous (..., C) to (..., OUT) in ``dtype``, in which products are."""
    (out, c), (tile, warps, stages) = weight.shape, FORWARD
    y, positions = x.new_empty(*x.shape[:-1], out, dtype=dtype), x.numel() // c
    forward_kernel[(triton.cdiv(positions, tile["BM"]),)](
        x, weight, bias, y, positions, **_constants(c, out, dtype, tile), num_warps=warps, num_stages=stages
    )
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of contiguous x, and of weight and bias in fp32."""
    (out, c), (tile, warps, stages) = weight.shape, BACKWARD
    dx, positions = torch.empty_like(x), x.numel() // c
    programs = PER_PROCESSOR * parts(x.device, 1, triton.cdiv(positions, tile["BM"]))
    dw, db = (x.new_empty(programs, *shape, dtype=torch.float32) for shape in ((out, c), (out,)))
    backward_kernel[(programs,)](
        grad,
        x,
        weight,
        dx,
        dw,
        db,
        positions,
        **_constants(c, out, grad.dtype, tile),
        num_warps=warps,
        num_stages=stages,
    )
    return dx, dw.sum(0), db.sum(0)


def _launches() -> list[Launch]:
    """z of Boltz-2 in bf16-mixed and in bf16, to the eight heads of the MSA and the 16 of the single track."""
    found = []
    for x in ("*fp32", "*bf16"):
        types = {"x_ptr": x, "w_ptr": "*fp32", "P": "i32"}
        forward_types = types | {"b_ptr": "*fp32", "out_ptr": "*bf16"}
        backward_types = types | {"grad_ptr": "*bf16", "dx_ptr": x, "dw_ptr": "*fp32", "db_ptr": "*fp32"}
        for out in (8, 16):
            for name, kernel, of, (tile, warps, stages) in (
                ("forward", forward_kernel, forward_types, FORWARD),
                ("backward", backward_kernel, backward_types, BACKWARD),
            ):
                constants = _constants(128, out, torch.bfloat16, tile)
                title = f"normed projection to {out} {name}, x {x[1:]}"
                found.append(Launch(title, kernel, of, constants, warps, stages))
    return found


LAUNCHES = _launches()
