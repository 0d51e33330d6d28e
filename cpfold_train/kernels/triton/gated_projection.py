"""Triton's kernels of :mod:`cpfold_train.kernels.gated_projection`.

z is (B, P, C), the mask (B, P) and what is written (B, OUT, P): P pairs, OUT channels. Projections are (2 OUT, C),
their biases (2 OUT,): first those of the values, then those of their gates.
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
    AMPERE: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    HOPPER: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)),
    BLACKWELL: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)),
}
WIDE = Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1))
"""For products of fp32, which have twice the bytes and, but for TF32, no matrix units."""


def forward(z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, OUT, P) in the dtype of ``weight``."""
    batch, pairs, c = z.shape
    out = weight.new_empty(batch, len(weight) // 2, pairs)
    tile = tiles_for(z.device, weight.dtype, TILES, WIDE).forward
    _forward[triton.cdiv(pairs, tile.pairs), batch](
        z, mask, weight, bias, out, pairs, c, out.shape[1], tile.pairs, min(tile.channels, out.shape[1]),
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def backward(grad: Tensor, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, beside: Tensor | None) -> Tensor:
    """Gradient of z, in its dtype, with ``beside`` added."""
    batch, pairs, c = z.shape
    dz = torch.empty_like(z)
    tile = tiles_for(z.device, weight.dtype, TILES, WIDE).backward
    _backward[triton.cdiv(pairs, tile.pairs), batch](
        grad, z, mask, weight, bias, beside, dz, pairs, c, grad.shape[1], tile.pairs, min(tile.channels, grad.shape[1]),
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dz


def weights(grad: Tensor, z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` and ``bias``, in fp32."""
    (batch, pairs, c), channels = z.shape, grad.shape[1]
    tile = tiles_for(z.device, weight.dtype, TILES, WIDE).weights
    slices = triton.cdiv(channels, tile.channels)
    count = parts(z.device, slices, batch * triton.cdiv(pairs, tile.pairs), tile.num_warps)
    sums = [w.new_empty(count, *w.shape, dtype=torch.float32) for w in (weight, bias)]
    _weights[slices, count](
        grad, z, mask, weight, bias, *sums, batch, pairs, c, channels, tile.pairs, min(tile.channels, channels),
        **dot_constants(weight.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    dweight, dbias = (x.sum(0) for x in sums)
    return dweight, dbias


@triton.jit
def _forward(z_ptr, mask_ptr, w_ptr, b_ptr, out_ptr, P, C: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr,
             BO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: all channels of BM pairs, BO at a time."""
    start, batch = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside = m < P - start
    z_ptr += (batch * P + start) * C
    out_ptr += batch * OUT * P + start
    z = tl.load(z_ptr + m[:, None] * C + c[None, :], mask=inside[:, None], other=0.0)
    x, _ = normalise(z.to(tl.float32), C, 1)
    x = x.to(DOT)
    keep = tl.load(mask_ptr + batch * P + start + m, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, OUT, BO):
        o = first + tl.arange(0, BO)
        wp = tl.load(w_ptr + o[None, :] * C + c[:, None]).to(DOT)
        wg = tl.load(w_ptr + (OUT + o[None, :]) * C + c[:, None]).to(DOT)
        p = tl.dot(x, wp, input_precision=PRECISION) + tl.load(b_ptr + o)[None, :]
        g = tl.dot(x, wg, input_precision=PRECISION) + tl.load(b_ptr + OUT + o)[None, :]
        y = p * sigmoid(g) * keep[:, None]
        at = out_ptr + o[None, :].to(tl.int64) * P + m[:, None]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward(dy_ptr, z_ptr, mask_ptr, w_ptr, b_ptr, beside_ptr, dz_ptr, P, C: tl.constexpr, OUT: tl.constexpr,
              BM: tl.constexpr, BO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradient of z of BM pairs; the projections are computed again."""
    start, batch = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, C)
    inside, at = m < P - start, m[:, None] * C + c[None, :]
    z_ptr += (batch * P + start) * C
    dz_ptr += (batch * P + start) * C
    dy_ptr += batch * OUT * P + start
    x, _ = normalise(tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32), C, 1)
    x = x.to(DOT)
    keep = tl.load(mask_ptr + batch * P + start + m, mask=inside, other=0.0).to(tl.float32)
    dx = tl.zeros([BM, C], tl.float32)
    for first in range(0, OUT, BO):
        o = first + tl.arange(0, BO)
        wp = tl.load(w_ptr + o[:, None] * C + c[None, :]).to(DOT)
        wg = tl.load(w_ptr + (OUT + o[:, None]) * C + c[None, :]).to(DOT)
        dy = tl.load(dy_ptr + o[None, :].to(tl.int64) * P + m[:, None], mask=inside[:, None], other=0.0)
        p = tl.dot(x, tl.trans(wp), input_precision=PRECISION) + tl.load(b_ptr + o)[None, :]
        g = sigmoid(tl.dot(x, tl.trans(wg), input_precision=PRECISION) + tl.load(b_ptr + OUT + o)[None, :])
        dp = dy.to(tl.float32) * keep[:, None] * g
        dg = dp * p * (1.0 - g)
        dx = tl.dot(dp.to(DOT), wp, dx, input_precision=PRECISION)
        dx = tl.dot(dg.to(DOT), wg, dx, input_precision=PRECISION)
    # Read and normalised once more: kept in registers it would halve the tile.
    x, scale = normalise(tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32), C, 1)
    dz = normalise_backward(dx, x, scale, C, 1)
    if beside_ptr is not None:
        dz += tl.load(beside_ptr + (batch * P + start) * C + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _weights(dy_ptr, z_ptr, mask_ptr, w_ptr, b_ptr, dw_ptr, db_ptr, B, P, C: tl.constexpr, OUT: tl.constexpr,
             BM: tl.constexpr, BO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: gradients of the projections to BO channels, added up over every n-th block of BM pairs.

    The programs of the same blocks are neighbours, so that z comes from L2 for all of them but one.
    """
    o, m, c = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, BM), tl.arange(0, C)
    at = o[:, None] * C + c[None, :]
    wp, wg = tl.load(w_ptr + at).to(DOT), tl.load(w_ptr + OUT * C + at).to(DOT)
    bp, bg = tl.load(b_ptr + o), tl.load(b_ptr + OUT + o)
    dwp, dwg = tl.zeros([BO, C], tl.float32), tl.zeros([BO, C], tl.float32)
    dbp, dbg = tl.zeros([BO], tl.float32), tl.zeros([BO], tl.float32)
    blocks = tl.cdiv(P, BM)
    for block in range(tl.program_id(1), B * blocks, tl.num_programs(1)):
        batch, start = (block // blocks).to(tl.int64), block % blocks * BM
        inside = m < P - start
        z = z_ptr + (batch * P + start) * C + (m[:, None] * C + c[None, :])
        x, _ = normalise(tl.load(z, mask=inside[:, None], other=0.0).to(tl.float32), C, 1)
        x = x.to(DOT)
        keep = tl.load(mask_ptr + batch * P + start + m, mask=inside, other=0.0).to(tl.float32)
        dy = dy_ptr + (batch * OUT * P + start) + (o[:, None].to(tl.int64) * P + m[None, :])
        dy = tl.load(dy, mask=inside[None, :], other=0.0)
        p = tl.dot(wp, tl.trans(x), input_precision=PRECISION) + bp[:, None]
        g = sigmoid(tl.dot(wg, tl.trans(x), input_precision=PRECISION) + bg[:, None])
        dp = dy.to(tl.float32) * keep[None, :] * g
        dg = dp * p * (1.0 - g)
        dbp += tl.sum(dp, 1)
        dbg += tl.sum(dg, 1)
        dwp = tl.dot(dp.to(DOT), x, dwp, input_precision=PRECISION)
        dwg = tl.dot(dg.to(DOT), x, dwg, input_precision=PRECISION)
    dw_ptr += tl.program_id(1).to(tl.int64) * 2 * OUT * C
    db_ptr += tl.program_id(1) * 2 * OUT
    tl.store(dw_ptr + at, dwp)
    tl.store(dw_ptr + OUT * C + at, dwg)
    tl.store(db_ptr + o, dbp)
    tl.store(db_ptr + OUT + o, dbg)


def _launches() -> list[Launch]:
    """Boltz-2's pairs in bf16-mixed and in bf16."""
    found = []
    for z, (major, tiles) in product(("fp32", "bf16"), TILES.items()):
        types = {"z_ptr": f"*{z}", "mask_ptr": "*fp32", "w_ptr": "*bf16", "b_ptr": "*fp32", "P": "i32"}
        grads = {**types, "dy_ptr": "*bf16"}
        for name, kernel, tile, of in (
            ("forward", _forward, tiles.forward, {**types, "out_ptr": "*bf16"}),
            ("backward", _backward, tiles.backward, {**grads, "beside_ptr": f"*{z}", "dz_ptr": f"*{z}"}),
            ("weights", _weights, tiles.weights, {**grads, "dw_ptr": "*fp32", "db_ptr": "*fp32", "B": "i32"}),
        ):
            constants = {"C": 128, "OUT": 256, "BM": tile.pairs, "BO": tile.channels, **dot_constants(torch.bfloat16)}
            case = f"gated_projection {name}, z {z}, {major}.0"
            found.append(Launch(case, kernel, of, constants, tile.num_warps, tile.num_stages, major))
    return found


LAUNCHES = _launches()
