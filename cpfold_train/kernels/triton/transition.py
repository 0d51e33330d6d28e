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
from cpfold_train.kernels.triton.tile import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    Tile,
    Tiles,
    dot_constants,
    normalise,
    normalise_backward,
    parts,
    sigmoid,
    tiles_for,
)

TILES = {
    AMPERE: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    HOPPER: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 128, 8, 2)),
    BLACKWELL: Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
}
WIDE = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1))
"""For products of fp32, which have twice the bytes and, but for TF32, no matrix units."""


def forward(x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, residual: bool, dtype: torch.dtype) -> Tensor:
    """(P, C) in ``dtype``."""
    positions, c = x.shape
    out = torch.empty_like(x, dtype=dtype)
    tile = tiles_for(x.device, w12.dtype, TILES, WIDE).forward
    _forward[(triton.cdiv(positions, tile.pairs),)](
        x, w12, b12, w3, out, positions, c, len(w3), tile.pairs, min(tile.channels, len(w3)), residual,
        **dot_constants(w12.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, w12: Tensor, b12: Tensor, w3: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x, in its dtype; the normalised x in that of the weights; ``grad`` in it too, or nothing if it is."""
    (positions, c), hidden, dtype = x.shape, len(w3), w12.dtype
    cast = grad.dtype != dtype
    found = torch.empty_like(x), torch.empty_like(x, dtype=dtype), x.new_empty(x.shape if cast else 0, dtype=dtype)
    tile = tiles_for(x.device, dtype, TILES, WIDE).backward
    _backward[(triton.cdiv(positions, tile.pairs),)](
        grad, x, w12, b12, w3, *found, positions, c, hidden, tile.pairs, min(tile.channels, hidden), residual, cast,
        **dot_constants(dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return found


def weights(grad: Tensor, normed: Tensor, w12: Tensor, b12: Tensor, w3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``w12``, ``b12`` and ``w3``, in fp32; ``grad`` and ``normed`` are in the dtype of the weights."""
    (positions, c), hidden = normed.shape, len(w3)
    tile = tiles_for(normed.device, w12.dtype, TILES, WIDE).weights
    slices = triton.cdiv(hidden, tile.channels)
    count = parts(normed.device, slices, triton.cdiv(positions, tile.pairs), tile.num_warps)
    sums = [w.new_empty(count, *w.shape, dtype=torch.float32) for w in (w12, b12, w3)]
    _weights[slices, count](
        grad, normed, w12, b12, w3, *sums, positions, c, hidden, tile.pairs, min(tile.channels, hidden),
        **dot_constants(w12.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    dw12, db12, dw3 = (x.sum(0) for x in sums)
    return dw12, db12, dw3


@triton.jit
def _forward(x_ptr, w_ptr, b_ptr, w3_ptr, out_ptr, P, C: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
             BH: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: BM positions; the hidden channels come BH at a time and never leave the multiprocessor."""
    start = tl.program_id(0) * BM
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside, at = m[:, None] < P - start, m[:, None] * C + c[None, :]
    x_ptr += start.to(tl.int64) * C
    out_ptr += start.to(tl.int64) * C
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
def _backward(dy_ptr, x_ptr, w_ptr, b_ptr, w3_ptr, dx_ptr, normed_ptr, cast_ptr, P, C: tl.constexpr, H: tl.constexpr,
              BM: tl.constexpr, BH: tl.constexpr, RESIDUAL: tl.constexpr, CAST: tl.constexpr, DOT: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradient of x at BM positions; the hidden channels are computed again. Also what :func:`_weights`
    reads: the normalised x and, where it is in another dtype, dy in that of the products."""
    start = tl.program_id(0) * BM
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside, at = m[:, None] < P - start, m[:, None] * C + c[None, :]
    x_ptr += start.to(tl.int64) * C
    dy_ptr += start.to(tl.int64) * C
    dx_ptr += start.to(tl.int64) * C
    normed_ptr += start.to(tl.int64) * C
    x, _ = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), C, 1)
    x = x.to(DOT)
    tl.store(normed_ptr + at, x.to(normed_ptr.dtype.element_ty), mask=inside)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(DOT)
    if CAST:
        tl.store(cast_ptr + start.to(tl.int64) * C + at, dy.to(cast_ptr.dtype.element_ty), mask=inside)
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
        u = a * s
        da = du * b * (s + u * (1.0 - s))
        db = du * u
        dx = tl.dot(da.to(DOT), w1, dx, input_precision=PRECISION)
        dx = tl.dot(db.to(DOT), w2, dx, input_precision=PRECISION)
    # Read once more: kept in registers x and dy would halve the tile.
    x, scale = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), C, 1)
    dx = normalise_backward(dx, x, scale, C, 1)
    if RESIDUAL:
        dx += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(dy_ptr, normed_ptr, w_ptr, b_ptr, w3_ptr, dw_ptr, db_ptr, dw3_ptr, P, C: tl.constexpr, H: tl.constexpr,
             BM: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradients of the weights of BH hidden channels, added up over every n-th block of BM positions.

    The programs of the same blocks are neighbours, so that normalised x and dy come from L2 for all of them but one.
    """
    h, m, c = tl.program_id(0) * BH + tl.arange(0, BH), tl.arange(0, BM), tl.arange(0, C)
    at = h[:, None] * C + c[None, :]
    w1, w2, w3 = tl.load(w_ptr + at).to(DOT), tl.load(w_ptr + H * C + at).to(DOT), tl.load(w3_ptr + at).to(DOT)
    b1, b2 = tl.load(b_ptr + h), tl.load(b_ptr + H + h)
    dw1, dw2, dw3 = tl.zeros([BH, C], tl.float32), tl.zeros([BH, C], tl.float32), tl.zeros([BH, C], tl.float32)
    db1, db2 = tl.zeros([BH], tl.float32), tl.zeros([BH], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(P, BM), tl.num_programs(1)):
        start = tl.full([], block, tl.int64) * BM * C
        inside, rows = m[:, None] < P - block * BM, m[:, None] * C + c[None, :]
        x = tl.load(normed_ptr + start + rows, mask=inside, other=0.0).to(DOT)
        dy = tl.load(dy_ptr + start + rows, mask=inside, other=0.0).to(DOT)
        a = tl.dot(w1, tl.trans(x), input_precision=PRECISION) + b1[:, None]
        b = tl.dot(w2, tl.trans(x), input_precision=PRECISION) + b2[:, None]
        s = sigmoid(a)
        u = a * s
        # All in the products' dtype, for there are few registers left beside the sums.
        to_a, to_b = (b * (s + u * (1.0 - s))).to(DOT), u.to(DOT)
        dw3 = tl.dot((u * b).to(DOT), dy, dw3, input_precision=PRECISION)
        du = tl.dot(w3, tl.trans(dy), input_precision=PRECISION).to(DOT)
        da, db = du * to_a, du * to_b
        db1 += tl.sum(da.to(tl.float32), 1)
        db2 += tl.sum(db.to(tl.float32), 1)
        dw1 = tl.dot(da, x, dw1, input_precision=PRECISION)
        dw2 = tl.dot(db, x, dw2, input_precision=PRECISION)
    part = tl.program_id(1).to(tl.int64)
    tl.store(dw_ptr + part * 2 * H * C + at, dw1)
    tl.store(dw_ptr + part * 2 * H * C + H * C + at, dw2)
    tl.store(dw3_ptr + part * H * C + at, dw3)
    tl.store(db_ptr + part * 2 * H + h, db1)
    tl.store(db_ptr + part * 2 * H + H + h, db2)


def _launches() -> list[Launch]:
    """Boltz-2's pairs in bf16-mixed and in bf16."""
    types = {"w_ptr": "*bf16", "b_ptr": "*fp32", "w3_ptr": "*bf16", "P": "i32", "normed_ptr": "*bf16"}
    sums = {"dw_ptr": "*fp32", "db_ptr": "*fp32", "dw3_ptr": "*fp32"}
    found = []
    for major, tiles in TILES.items():
        cases = [("weights", _weights, tiles.weights, {"dy_ptr": "*bf16", **sums}, {})]
        for x in ("fp32", "bf16"):
            grads = {"x_ptr": f"*{x}", "dy_ptr": f"*{x}", "dx_ptr": f"*{x}", "cast_ptr": "*bf16"}
            outs = {"x_ptr": f"*{x}", "out_ptr": f"*{x}"}
            backward = {"RESIDUAL": True, "CAST": x == "fp32"}
            cases.append((f"forward, x {x}", _forward, tiles.forward, outs, {"RESIDUAL": True}))
            cases.append((f"backward, x {x}", _backward, tiles.backward, grads, backward))
        for name, kernel, tile, more, constants in cases:
            of = {argument: kind for argument, kind in (types | more).items() if argument in kernel.arg_names}
            constants |= {"C": 128, "H": 512, "BM": tile.pairs, "BH": tile.channels, **dot_constants(torch.bfloat16)}
            case = f"transition {name}, {major}.0"
            found.append(Launch(case, kernel, of, constants, tile.num_warps, tile.num_stages, major))
    return found


LAUNCHES = _launches()
