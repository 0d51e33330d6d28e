"""Triton's kernels of :mod:`cpfold_train.kernels.transition`.

x is (P, C): P positions. ``w1`` and ``w2`` lie one after the other, (2 H, C), as do their biases, (2 H,); ``w3`` comes
transposed, (H, C), so that all three are read along C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch
from cpfold_train.kernels.triton.tile import Tile, dot_constants, normalise, normalise_backward, parts, sigmoid

FORWARD, BACKWARD, WEIGHTS = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)
WIDE_FORWARD, WIDE_BACKWARD, WIDE_WEIGHTS = Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 8, 1)
"""Products of fp32 have no matrix units to themselves and twice the bytes."""


def forward(x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, residual: bool, dtype: torch.dtype) -> Tensor:
    """(P, C) in ``dtype``."""
    positions, c = x.shape
    out = torch.empty_like(x, dtype=dtype)
    tile = WIDE_FORWARD if w12.dtype == torch.float32 else FORWARD
    _forward[(triton.cdiv(positions, tile.pairs),)](
        x, w12, b12, w3, out, positions, c, len(w3), tile.pairs, min(tile.channels, len(w3)), residual,
        **dot_constants(w12.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype, and of ``w12``, ``b12`` and ``w3``, in fp32."""
    positions, c = x.shape
    hidden, wide = len(w3), w12.dtype == torch.float32
    constants = dot_constants(w12.dtype)
    dx = torch.empty_like(x)
    tile = WIDE_BACKWARD if wide else BACKWARD
    _backward[(triton.cdiv(positions, tile.pairs),)](
        grad, x, w12, b12, w3, dx, positions, c, hidden, tile.pairs, min(tile.channels, hidden), residual,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = WIDE_WEIGHTS if wide else WEIGHTS
    slices = triton.cdiv(hidden, tile.channels)
    count = parts(x.device, slices, triton.cdiv(positions, tile.pairs))
    sums = [w.new_empty(count, *w.shape, dtype=torch.float32) for w in (w12, b12, w3)]
    _weights[slices, count](
        grad, x, w12, b12, w3, *sums, positions, c, hidden, tile.pairs, min(tile.channels, hidden),
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dx, *(x.sum(0) for x in sums)


@triton.jit
def _forward(x_ptr, w_ptr, b_ptr, w3_ptr, out_ptr, P, C: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
             BH: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: BM positions; the hidden channels come BH at a time and never leave the multiprocessor."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    inside = m[:, None] < P
    at = m[:, None].to(tl.int64) * C + c[None, :]
    x, _ = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), C, 1)
    x = x.to(DOT)
    out = tl.zeros([BM, C], tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        w1 = tl.load(w_ptr + h[None, :] * C + c[:, None]).to(DOT)
        w2 = tl.load(w_ptr + (H + h[None, :]) * C + c[:, None]).to(DOT)
        w3 = tl.load(w3_ptr + h[:, None] * C + c[None, :]).to(DOT)
        a = tl.dot(x, w1, input_precision=PRECISION) + tl.load(b_ptr + h)[None, :]
        b = tl.dot(x, w2, input_precision=PRECISION) + tl.load(b_ptr + H + h)[None, :]
        out = tl.dot((a * sigmoid(a) * b).to(DOT), w3, out, input_precision=PRECISION)
    if RESIDUAL:
        out += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy_ptr, x_ptr, w_ptr, b_ptr, w3_ptr, dx_ptr, P, C: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
              BH: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradient of x at BM positions; the hidden channels are computed again."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    inside = m[:, None] < P
    at = m[:, None].to(tl.int64) * C + c[None, :]
    x, _ = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), C, 1)
    x = x.to(DOT)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(DOT)
    dx = tl.zeros([BM, C], tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        w1 = tl.load(w_ptr + h[:, None] * C + c[None, :]).to(DOT)
        w2 = tl.load(w_ptr + (H + h[:, None]) * C + c[None, :]).to(DOT)
        w3 = tl.load(w3_ptr + h[:, None] * C + c[None, :]).to(DOT)
        a = tl.dot(x, tl.trans(w1), input_precision=PRECISION) + tl.load(b_ptr + h)[None, :]
        b = tl.dot(x, tl.trans(w2), input_precision=PRECISION) + tl.load(b_ptr + H + h)[None, :]
        du = tl.dot(dy, tl.trans(w3), input_precision=PRECISION)
        s = sigmoid(a)
        da = du * b * s * (1.0 + a * (1.0 - s))
        db = du * a * s
        dx = tl.dot(da.to(DOT), w1, dx, input_precision=PRECISION)
        dx = tl.dot(db.to(DOT), w2, dx, input_precision=PRECISION)
    # Read once more: kept in registers x and dy would halve the tile.
    x, scale = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), C, 1)
    dx = normalise_backward(dx, x, scale, C, 1)
    if RESIDUAL:
        dx += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(dy_ptr, x_ptr, w_ptr, b_ptr, w3_ptr, dw_ptr, db_ptr, dw3_ptr, P, C: tl.constexpr, H: tl.constexpr,
             BM: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradients of the weights of BH hidden channels, added up over every n-th block of BM positions.

    The programs of the same blocks are neighbours, so that x and dy come from L2 for all of them but one.
    """
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    c = tl.arange(0, C)
    at = h[:, None] * C + c[None, :]
    w1, w2, w3 = tl.load(w_ptr + at).to(DOT), tl.load(w_ptr + H * C + at).to(DOT), tl.load(w3_ptr + at).to(DOT)
    b1, b2 = tl.load(b_ptr + h), tl.load(b_ptr + H + h)
    dw1, dw2, dw3 = tl.zeros([BH, C], tl.float32), tl.zeros([BH, C], tl.float32), tl.zeros([BH, C], tl.float32)
    db1, db2 = tl.zeros([BH], tl.float32), tl.zeros([BH], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(P, BM), tl.num_programs(1)):
        m = block * BM + tl.arange(0, BM)
        inside = m[:, None] < P
        rows = m[:, None].to(tl.int64) * C + c[None, :]
        x, _ = normalise(tl.load(x_ptr + rows, mask=inside, other=0.0).to(tl.float32), C, 1)
        x = x.to(DOT)
        dy = tl.load(dy_ptr + rows, mask=inside, other=0.0).to(DOT)
        a = tl.dot(w1, tl.trans(x), input_precision=PRECISION) + b1[:, None]
        b = tl.dot(w2, tl.trans(x), input_precision=PRECISION) + b2[:, None]
        du = tl.dot(w3, tl.trans(dy), input_precision=PRECISION)
        s = sigmoid(a)
        da = du * b * s * (1.0 + a * (1.0 - s))
        db = du * a * s
        db1 += tl.sum(da, 1)
        db2 += tl.sum(db, 1)
        dw1 = tl.dot(da.to(DOT), x, dw1, input_precision=PRECISION)
        dw2 = tl.dot(db.to(DOT), x, dw2, input_precision=PRECISION)
        dw3 = tl.dot((a * s * b).to(DOT), dy, dw3, input_precision=PRECISION)
    part = tl.program_id(1).to(tl.int64)
    tl.store(dw_ptr + part * 2 * H * C + at, dw1)
    tl.store(dw_ptr + part * 2 * H * C + H * C + at, dw2)
    tl.store(dw3_ptr + part * H * C + at, dw3)
    tl.store(db_ptr + part * 2 * H + h, db1)
    tl.store(db_ptr + part * 2 * H + H + h, db2)


def _launches() -> list[Launch]:
    """Boltz-2's pairs in bf16-mixed and in bf16."""
    found = []
    for x in ("fp32", "bf16"):
        types = {"x_ptr": f"*{x}", "w_ptr": "*bf16", "b_ptr": "*fp32", "w3_ptr": "*bf16", "P": "i32"}
        grads = {**types, "dy_ptr": f"*{x}"}
        sums = {"dw_ptr": "*fp32", "db_ptr": "*fp32", "dw3_ptr": "*fp32"}
        for name, kernel, tile, of in (
            ("forward", _forward, FORWARD, {**types, "out_ptr": f"*{x}"}),
            ("backward", _backward, BACKWARD, {**grads, "dx_ptr": f"*{x}"}),
            ("weights", _weights, WEIGHTS, {**grads, **sums}),
        ):
            constants = {"C": 128, "H": 512, "BM": tile.pairs, "BH": tile.channels, **dot_constants(torch.bfloat16)}
            if kernel is not _weights:
                constants["RESIDUAL"] = True
            found.append(Launch(f"transition {name}, x {x}", kernel, of, constants, *tile[2:]))
    return found


LAUNCHES = _launches()
