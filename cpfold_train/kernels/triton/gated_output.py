"""Triton's kernels of :mod:`cpfold_train.kernels.gated_output`.

x is (B, C, P) and z (B, P, C), P pairs, with a factor for each, (B, P). Projections are (2 C, C), their biases (2 C,):
first those of x, then those of the gates, from z.
"""

from __future__ import annotations

from itertools import product

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
    AMPERE: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    HOPPER: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 128, 8, 2)),
    BLACKWELL: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 128, 8, 2)),
}
WIDE = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1))
"""For products of fp32, which have twice the bytes and, but for TF32, no matrix units."""


def forward(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None, residual: bool, dtype: torch.dtype
) -> Tensor:
    """(B, P, C) in ``dtype``."""
    batch, pairs, c = z.shape
    out = torch.empty_like(z, dtype=dtype)
    tile = tiles_for(z.device, weight.dtype, TILES, WIDE).forward
    _forward[triton.cdiv(pairs, tile.pairs), batch](
        x, z, weight, bias, factors, out, pairs, c, tile.pairs, min(tile.channels, c), residual,
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and z, in their dtypes, and the normalised z in that of ``weight``."""
    batch, pairs, c = z.shape
    found = torch.empty_like(x), torch.empty_like(z), torch.empty_like(z, dtype=weight.dtype)
    tile = tiles_for(z.device, weight.dtype, TILES, WIDE).backward
    _backward[triton.cdiv(pairs, tile.pairs), batch](
        grad, x, z, weight, bias, factors, *found, pairs, c, tile.pairs, min(tile.channels, c), residual,
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return found


def weights(
    grad: Tensor, x: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` and ``bias``, in fp32."""
    batch, pairs, c = normed.shape
    tile = tiles_for(x.device, weight.dtype, TILES, WIDE).weights
    slices = triton.cdiv(c, tile.channels)
    count = parts(x.device, slices, batch * triton.cdiv(pairs, tile.pairs), tile.num_warps)
    sums = [w.new_empty(count, *w.shape, dtype=torch.float32) for w in (weight, bias)]
    _weights[slices, count](
        grad, x, normed, weight, bias, factors, *sums, batch, pairs, c, tile.pairs, min(tile.channels, c),
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    dweight, dbias = (w.sum(0) for w in sums)
    return dweight, dbias


@triton.jit
def _factors(f_ptr, first, m, inside):
    """Those of pairs from ``first`` on; 1 where there are none."""
    if f_ptr is None:
        return tl.full(m.shape, 1.0, tl.float32)
    else:
        return tl.load(f_ptr + first + m, mask=inside, other=0.0)


@triton.jit
def _forward(x_ptr, z_ptr, w_ptr, b_ptr, f_ptr, out_ptr, P, C: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
             RESIDUAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: all channels of BM pairs, BO at a time."""
    start, batch = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside = m[:, None] < P - start
    x_ptr += batch * C * P + start
    z_ptr += (batch * P + start) * C
    out_ptr += (batch * P + start) * C
    x = tl.load(x_ptr + c[None, :].to(tl.int64) * P + m[:, None], mask=inside, other=0.0)
    x, _ = normalise(x.to(tl.float32), C, 1)
    z, _ = normalise(tl.load(z_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32), C, 1)
    x, z = x.to(DOT), z.to(DOT)
    factor = _factors(f_ptr, batch * P + start, m, m < P - start)
    for first in range(0, C, BO):
        o = first + tl.arange(0, BO)
        wp = tl.load(w_ptr + o[None, :] * C + c[:, None]).to(DOT)
        wg = tl.load(w_ptr + (C + o[None, :]) * C + c[:, None]).to(DOT)
        p = tl.dot(x, wp, input_precision=PRECISION) + tl.load(b_ptr + o)[None, :]
        g = tl.dot(z, wg, input_precision=PRECISION) + tl.load(b_ptr + C + o)[None, :]
        y = p * sigmoid(g) * factor[:, None]
        at = m[:, None] * C + o[None, :]
        if RESIDUAL:
            y += tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy_ptr, x_ptr, z_ptr, w_ptr, b_ptr, f_ptr, dx_ptr, dz_ptr, normed_ptr, P, C: tl.constexpr,
              BM: tl.constexpr, BO: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradients of x and z of BM pairs; the projections are computed again. Also the normalised z, which
    :func:`_weights` reads: normalised there, both would take more registers than there are."""
    start, batch = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside = m[:, None] < P - start
    x_at, z_at = c[None, :].to(tl.int64) * P + m[:, None], m[:, None] * C + c[None, :]
    x_ptr += batch * C * P + start
    dx_ptr += batch * C * P + start
    z_ptr += (batch * P + start) * C
    dz_ptr += (batch * P + start) * C
    dy_ptr += (batch * P + start) * C
    normed_ptr += (batch * P + start) * C
    x, _ = normalise(tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32), C, 1)
    z, _ = normalise(tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32), C, 1)
    x, z = x.to(DOT), z.to(DOT)
    tl.store(normed_ptr + z_at, z.to(normed_ptr.dtype.element_ty), mask=inside)
    factor = _factors(f_ptr, batch * P + start, m, m < P - start)
    dx, dz = tl.zeros([BM, C], tl.float32), tl.zeros([BM, C], tl.float32)
    for first in range(0, C, BO):
        o = first + tl.arange(0, BO)
        wp = tl.load(w_ptr + o[:, None] * C + c[None, :]).to(DOT)
        wg = tl.load(w_ptr + (C + o[:, None]) * C + c[None, :]).to(DOT)
        dy = tl.load(dy_ptr + m[:, None] * C + o[None, :], mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        p = tl.dot(x, tl.trans(wp), input_precision=PRECISION) + tl.load(b_ptr + o)[None, :]
        g = sigmoid(tl.dot(z, tl.trans(wg), input_precision=PRECISION) + tl.load(b_ptr + C + o)[None, :])
        dp = dy * g
        dx = tl.dot(dp.to(DOT), wp, dx, input_precision=PRECISION)
        dz = tl.dot((dp * p * (1.0 - g)).to(DOT), wg, dz, input_precision=PRECISION)
    # Read once more: kept in registers they would halve the tile.
    x, scale = normalise(tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32), C, 1)
    dx = normalise_backward(dx, x, scale, C, 1)
    tl.store(dx_ptr + x_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    z, scale = normalise(tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32), C, 1)
    dz = normalise_backward(dz, z, scale, C, 1)
    if RESIDUAL:
        dz += tl.load(dy_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dz_ptr + z_at, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(dy_ptr, x_ptr, normed_ptr, w_ptr, b_ptr, f_ptr, dw_ptr, db_ptr, B, P, C: tl.constexpr, BM: tl.constexpr,
             BO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradients of the projections to BO channels, added up over every n-th block of BM pairs.

    The programs of the same blocks are neighbours, so that what they share comes from L2 for all of them but one.
    """
    o, m, c = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, BM), tl.arange(0, C)
    at = o[:, None] * C + c[None, :]
    wp, wg = tl.load(w_ptr + at).to(DOT), tl.load(w_ptr + C * C + at).to(DOT)
    bp, bg = tl.load(b_ptr + o), tl.load(b_ptr + C + o)
    dwp, dwg = tl.zeros([BO, C], tl.float32), tl.zeros([BO, C], tl.float32)
    dbp, dbg = tl.zeros([BO], tl.float32), tl.zeros([BO], tl.float32)
    blocks = tl.cdiv(P, BM)
    for block in range(tl.program_id(1), B * blocks, tl.num_programs(1)):
        batch, start = (block // blocks).to(tl.int64), block % blocks * BM
        inside, first = m < P - start, (batch * P + start) * C
        x = x_ptr + (batch * C * P + start) + (c[None, :].to(tl.int64) * P + m[:, None])
        x, _ = normalise(tl.load(x, mask=inside[:, None], other=0.0).to(tl.float32), C, 1)
        x = x.to(DOT)
        z = tl.load(normed_ptr + first + (m[:, None] * C + c[None, :]), mask=inside[:, None], other=0.0).to(DOT)
        dy = tl.load(dy_ptr + first + (m[:, None] * C + o[None, :]), mask=inside[:, None], other=0.0).to(tl.float32)
        dy = tl.trans(dy * _factors(f_ptr, batch * P + start, m, inside)[:, None])
        p = tl.dot(wp, tl.trans(x), input_precision=PRECISION) + bp[:, None]
        g = sigmoid(tl.dot(wg, tl.trans(z), input_precision=PRECISION) + bg[:, None])
        dp = dy * g
        dg = dp * p * (1.0 - g)
        dbp += tl.sum(dp, 1)
        dbg += tl.sum(dg, 1)
        dwp = tl.dot(dp.to(DOT), x, dwp, input_precision=PRECISION)
        dwg = tl.dot(dg.to(DOT), z, dwg, input_precision=PRECISION)
    dw_ptr += tl.program_id(1).to(tl.int64) * 2 * C * C
    db_ptr += tl.program_id(1) * 2 * C
    tl.store(dw_ptr + at, dwp)
    tl.store(dw_ptr + C * C + at, dwg)
    tl.store(db_ptr + o, dbp)
    tl.store(db_ptr + C + o, dbg)


def _launches() -> list[Launch]:
    """Boltz-2's pairs in bf16-mixed and in bf16, with residual and dropout."""
    found = []
    for z, (major, tiles) in product(("fp32", "bf16"), TILES.items()):
        types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "b_ptr": "*fp32", "f_ptr": "*fp32", "P": "i32"}
        grads = {"dy_ptr": f"*{z}", "dx_ptr": "*bf16", "dz_ptr": f"*{z}", "normed_ptr": "*bf16"}
        sums = {"dw_ptr": "*fp32", "db_ptr": "*fp32", "B": "i32"}
        for name, kernel, tile, more, constants in (
            ("forward", _forward, tiles.forward, {"z_ptr": f"*{z}", "out_ptr": f"*{z}"}, {"RESIDUAL": True}),
            ("backward", _backward, tiles.backward, {"z_ptr": f"*{z}", **grads}, {"RESIDUAL": True}),
            ("weights", _weights, tiles.weights, {"dy_ptr": f"*{z}", "normed_ptr": "*bf16", **sums}, {}),
        ):
            constants |= {"C": 128, "BM": tile.pairs, "BO": tile.channels, **dot_constants(torch.bfloat16)}
            case = f"gated_output {name}, z {z}, {major}.0"
            found.append(Launch(case, kernel, types | more, constants, tile.num_warps, tile.num_stages, major))
    return found


LAUNCHES = _launches()
