"""Attention with an additive bias, forward: online softmax over blocks of keys (Dao et al., "FlashAttention", 2022).

A program takes BLOCK_M queries of one head in ROWS rows and goes over all keys. Per score it issues: the bias to fp32,
from which the product of queries and keys starts (so that adding it is part of the product); maximum; one multiply-add
that subtracts the maximum and turns to base 2; exp2; sum; half a conversion. Nothing in the loop is masked: indices of
queries beyond the last are clamped to it, the last and incomplete block of keys has a loop of its own.

Bytes. A program reads its tile of the bias once for its ROWS rows: at two rows 1 byte a score in bf16 from L2, beside
``4 d / BLOCK_M`` for keys and values (1 byte at d = 32, BLOCK_M = 128). That L2 traffic, not HBM's, is next to the
exponentials what bounds the kernel. For HBM, programs run in the order of :func:`place`: blocks of queries fastest, as
many as have 16 MB of bias, which then stay in L2 for all rows; rows; groups of blocks; heads. So the bias
is read once, and keys and values once for each group.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.attention_operators import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    Blocks,
    bias_groups,
    padded,
    precision,
    tiling,
    tiling_of,
)
from cpfold_train.kernels.triton.interpret import product_type
from cpfold_train.kernels.triton.launches import Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e7)
"""Scores below are those of masked keys. A query that has no others gets zeros; its products in base 2 stay finite."""


@triton.jit
def place(pid, blocks, group, rows):
    """Head of the batch, row and block of a program: blocks of a group fastest, then rows, groups and heads."""
    head = pid // (blocks * rows)
    pid = pid % (blocks * rows)
    first = pid // (group * rows) * group
    size = min(group, blocks - first)
    pid = pid - first * rows
    return head, pid // size, first + pid % size


@triton.jit
def tile(pointer, tokens, token_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Vectors of some tokens, (tokens, PADDED), zero from WIDTH on; those tokens must exist."""
    d = tl.arange(0, PADDED)
    at = pointer + tokens[:, None] * token_stride + d[None, :]
    if WIDTH == PADDED:
        return tl.load(at)
    return tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def widened(x):
    """To fp32. The compiler takes three instructions for two bf16 numbers of a register, and two for shifts of their
    bits."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def bias_tile(bias_rows, n, AGAIN: tl.constexpr):
    """Bias of some queries to the keys ``n`` in fp32; AGAIN where the row before has just read it."""
    if AGAIN:
        # Another modifier than before keeps the compiler from holding the tile in registers: it is in L1.
        return widened(tl.load(bias_rows + n[None, :], cache_modifier=".ca"))
    return widened(tl.load(bias_rows + n[None, :]))


@triton.jit
def _attend(
    q, k, v, bias, n, k_token, v_token, N, row_max, denom, acc,
    LAST: tl.constexpr, AGAIN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State of the softmax of some queries after another block of keys; LAST may have fewer than a block."""
    n_in = tl.minimum(n, N - 1) if LAST else n
    start = bias_tile(bias, n_in, AGAIN)
    if LAST:
        start = tl.where((n < N)[None, :], start, -float("inf"))
    k_n = tile(k, n_in, k_token, WIDTH, PADDED).to(DOT)
    v_n = tile(v, n_in, v_token, WIDTH, PADDED).to(DOT)
    scores = tl.dot(q, tl.trans(k_n), acc=start, input_precision=PRECISION)
    now = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores * LOG2E - (now * LOG2E)[:, None])
    rescale = tl.exp2((row_max - now) * LOG2E)
    denom = denom * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(DOT), v_n, acc=acc * rescale[:, None], input_precision=PRECISION)
    return now, denom, acc


@triton.jit
def _finish(
    out, gate, lse, row_max, denom, acc, m, M, stop, out_token, gate_token,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)
    denom = tl.where(denom > 0, denom, 1.0)
    acc = acc / denom[:, None]
    if GATED:
        acc *= tl.sigmoid(tile(gate, tl.minimum(m, M - 1), gate_token, WIDTH, PADDED).to(tl.float32))
    inside = m < stop
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + m[:, None] * out_token + d[None, :], acc, mask=inside[:, None] & (d < WIDTH)[None, :])
    tl.store(lse + m, row_max + tl.log2(denom) * LN2, mask=inside)


@triton.jit
def forward(
    q, k, v, bias, gate, out, lse, rows, heads, M, N, group,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    gate_batch, gate_row, gate_head, gate_token, out_batch, out_row, out_head, out_token,
    bias_batch, bias_head, bias_query,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head in ROWS rows a program, over all keys."""
    pairs = tl.cdiv(rows, ROWS)
    batch_head, pair, block = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), group, pairs)
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    r0 = (pair * ROWS).to(tl.int64)
    # Where the number of rows is odd, the last program takes the last row twice and writes it once.
    r1 = tl.minimum(r0 + ROWS - 1, rows - 1)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, M - 1)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    # Offsets within a head fit 32 bits up to 46,000 tokens, and take half the registers.
    bias += b * bias_batch + h * bias_head
    bias_rows = bias + (m_in * bias_query)[:, None]
    k0, v0, k1, v1 = k + r0 * k_row, v + r0 * v_row, k + r1 * k_row, v + r1 * v_row

    q0 = tile(q + r0 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
    highest0 = tl.full([BLOCK_M], LOWEST, tl.float32)
    total0 = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, PADDED], tl.float32)
    if ROWS == 2:
        q1 = tile(q + r1 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
        highest1, total1, acc1 = highest0, total0, acc0
    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        highest0, total0, acc0 = _attend(
            q0, k0, v0, bias_rows, n, k_token, v_token, N, highest0, total0, acc0,
            False, False, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
        if ROWS == 2:
            highest1, total1, acc1 = _attend(
                q1, k1, v1, bias_rows, n, k_token, v_token, N, highest1, total1, acc1,
                False, True, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    # Loops of at most one turn, one for each row, lest registers hold both rows' scores at a time.
    for start in tl.range(full, N, BLOCK_N, num_stages=1):
        n = start + tl.arange(0, BLOCK_N)
        highest0, total0, acc0 = _attend(
            q0, k0, v0, bias_rows, n, k_token, v_token, N, highest0, total0, acc0,
            True, False, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
    if ROWS == 2:
        for start in tl.range(full, N, BLOCK_N, num_stages=1):
            n = start + tl.arange(0, BLOCK_N)
            highest1, total1, acc1 = _attend(
                q1, k1, v1, bias_rows, n, k_token, v_token, N, highest1, total1, acc1,
                True, True, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    out += b * out_batch + h * out_head
    gate += b * gate_batch + h * gate_head
    lse += (b * rows * heads + h) * M
    _finish(
        out + r0 * out_row, gate + r0 * gate_row, lse + r0 * heads * M, highest0, total0, acc0,
        m, M, M, out_token, gate_token, WIDTH, PADDED, GATED,
    )  # fmt: skip
    if ROWS == 2:
        _finish(
            out + r1 * out_row, gate + r1 * gate_row, lse + r1 * heads * M, highest1, total1, acc1,
            m, M, tl.where(r0 + 1 < rows, M, 0), out_token, gate_token, WIDTH, PADDED, GATED,
        )  # fmt: skip


def constants(dtype: torch.dtype, width: int, blocks: Blocks) -> dict[str, object]:
    """Compile-time arguments that all kernels of attention take."""
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "DOT": product_type(dtype),
        "PRECISION": precision(dtype),
    }


def common(q: Tensor, blocks: Blocks) -> dict[str, object]:
    """What all kernels of attention are launched with."""
    launched = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return constants(q.dtype, q.shape[4], blocks) | launched


def strides(*tensors: Tensor) -> list[int]:
    """Of (B, r, h, tokens, d), all but the last."""
    return [stride for x in tensors for stride in x.stride()[:4]]


def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Run :func:`forward` on tensors as in :func:`cpfold_train.kernels.attention_operators.attention`."""
    batch, rows, heads, queries, _ = q.shape
    blocks = tiling(q).forward
    along = triton.cdiv(queries, blocks.m)
    group = triton.cdiv(along, bias_groups(bias, 2, blocks.m))
    some = out if gate is None else gate
    forward[batch * heads * along * triton.cdiv(rows, blocks.rows),](
        q, k, v, bias, some, out, lse, rows, heads, queries, k.shape[3], group,
        *strides(q, k, v, some, out), *bias.stride()[:3],
        ROWS=blocks.rows, GATED=gate is not None, **common(q, blocks),
    )  # fmt: skip


def typical(name: str, kernel: Any, which: str, own: dict[str, object]) -> list[Launch]:
    """Launches of a kernel at the widths of Boltz-2's pair stack and diffusion, in bf16, on each kind of GPU.

    Args:
        name, kernel: of the kernel.
        which: its tile in a :class:`~cpfold_train.kernels.attention_operators.Tiling`.
        own: compile-time arguments beside those of :func:`constants`; ``ROWS`` and ``STAGES`` are the tile's.
    """
    launches = []
    for width, major in product((32, 48), (AMPERE, HOPPER, BLACKWELL)):
        blocks = getattr(tiling_of(torch.bfloat16, width, major), which)
        if blocks is None:
            continue
        fixed = {**constants(torch.bfloat16, width, blocks), **own}
        tiled = {"ROWS": blocks.rows, "STAGES": blocks.stages}
        fixed |= {arg: value for arg, value in tiled.items() if arg in kernel.arg_names}
        types = {arg: TYPES.get(arg, "i32") for arg in kernel.arg_names if arg not in fixed}
        case = f"{name}, width {width}, {major}.0"
        launches.append(Launch(case, kernel, types, fixed, blocks.warps, blocks.stages, major))
    return launches


TYPES = dict.fromkeys(("q", "k", "v", "bias", "gate", "out", "grad", "dq", "dk", "dv", "dgate", "before"), "*bf16")
TYPES |= {"bias_max": "*bf16"} | dict.fromkeys(("lse", "delta", "dbias", "sums"), "*fp32")
LAUNCHES = typical("attention", forward, "forward", {"GATED": True})
