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

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.attention_operators import Blocks, bias_groups, padded, tiling
from cpfold_train.kernels.triton.interpret import product_type

ROWS = 1
"""Rows of a program."""
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
def _attend(q, k, v, bias, highest, total, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """State of the softmax of some queries after another block of keys."""
    scores = tl.dot(q, tl.trans(k.to(DOT)), acc=bias, input_precision=PRECISION)
    now = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores * LOG2E - (now * LOG2E)[:, None])
    rescale = tl.exp2((highest - now) * LOG2E)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(DOT), v.to(DOT), acc=acc * rescale[:, None], input_precision=PRECISION)
    return now, total, acc


@triton.jit
def _finish(
    out, gate, lse, highest, total, acc, m, M, out_token, gate_token, exists,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    if GATED:
        acc *= tl.sigmoid(tile(gate, tl.minimum(m, M - 1), gate_token, WIDTH, PADDED).to(tl.float32))
    inside = (m < M) & exists
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + m[:, None] * out_token + d[None, :], acc, mask=inside[:, None] & (d < WIDTH)[None, :])
    tl.store(lse + m, highest + tl.log2(total) * LN2, mask=inside)


@triton.jit
def forward(
    q, k, v, bias, gate, out, lse, rows, heads, M, N, group,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    gate_batch, gate_row, gate_head, gate_token, out_batch, out_row, out_head, out_token,
    bias_batch, bias_head, bias_query,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    out += b * out_batch + h * out_head
    gate += b * gate_batch + h * gate_head
    lse += (b * rows * heads + h) * M
    bias_rows = bias + b * bias_batch + h * bias_head + m_in.to(tl.int64)[:, None] * bias_query

    q0 = tile(q + r0 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
    highest0 = tl.full([BLOCK_M], LOWEST, tl.float32)
    total0 = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, PADDED], tl.float32)
    if ROWS == 2:
        q1 = tile(q + r1 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
        highest1, total1, acc1 = highest0, total0, acc0
    full = N // BLOCK_N * BLOCK_N
    bias_n = tl.load(bias_rows + tl.minimum(tl.arange(0, BLOCK_N), N - 1)[None, :])
    for start in range(0, full, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        start_from = bias_n.to(tl.float32)
        # Asked for a block ahead: Triton's pipeline is for operands of products only.
        ahead = tl.minimum(start + BLOCK_N, N - BLOCK_N)
        bias_n = tl.load(bias_rows + (ahead + tl.arange(0, BLOCK_N))[None, :])
        k_n = tile(k + r0 * k_row, n, k_token, WIDTH, PADDED)
        v_n = tile(v + r0 * v_row, n, v_token, WIDTH, PADDED)
        highest0, total0, acc0 = _attend(q0, k_n, v_n, start_from, highest0, total0, acc0, DOT, PRECISION)
        if ROWS == 2:
            k_n = tile(k + r1 * k_row, n, k_token, WIDTH, PADDED)
            v_n = tile(v + r1 * v_row, n, v_token, WIDTH, PADDED)
            highest1, total1, acc1 = _attend(q1, k_n, v_n, start_from, highest1, total1, acc1, DOT, PRECISION)
    if full < N:
        n = full + tl.arange(0, BLOCK_N)
        n_in = tl.minimum(n, N - 1)
        start_from = tl.load(bias_rows + n_in[None, :]).to(tl.float32)
        start_from = tl.where((n < N)[None, :], start_from, -float("inf"))
        k_n = tile(k + r0 * k_row, n_in, k_token, WIDTH, PADDED)
        v_n = tile(v + r0 * v_row, n_in, v_token, WIDTH, PADDED)
        highest0, total0, acc0 = _attend(q0, k_n, v_n, start_from, highest0, total0, acc0, DOT, PRECISION)
        if ROWS == 2:
            k_n = tile(k + r1 * k_row, n_in, k_token, WIDTH, PADDED)
            v_n = tile(v + r1 * v_row, n_in, v_token, WIDTH, PADDED)
            highest1, total1, acc1 = _attend(q1, k_n, v_n, start_from, highest1, total1, acc1, DOT, PRECISION)
    _finish(
        out + r0 * out_row, gate + r0 * gate_row, lse + r0 * heads * M, highest0, total0, acc0,
        m, M, out_token, gate_token, True, WIDTH, PADDED, GATED,
    )  # fmt: skip
    if ROWS == 2:
        _finish(
            out + r1 * out_row, gate + r1 * gate_row, lse + r1 * heads * M, highest1, total1, acc1,
            m, M, out_token, gate_token, r0 + 1 < rows, WIDTH, PADDED, GATED,
        )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """Of products of fp32, as torch's own are computed."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def common(q: Tensor, blocks: Blocks) -> dict[str, object]:
    """Compile-time arguments that all kernels of attention take."""
    return {
        "WIDTH": q.shape[4],
        "PADDED": padded(q.shape[4]),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "DOT": product_type(q.dtype),
        "PRECISION": precision(q.dtype),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def strides(*tensors: Tensor) -> list[int]:
    """Of (B, r, h, tokens, d), all but the last."""
    return [stride for x in tensors for stride in x.stride()[:4]]


def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Run :func:`forward` on tensors as in :func:`cpfold_train.kernels.attention_operators.attention`."""
    batch, rows, heads, queries, _ = q.shape
    blocks = tiling(q.dtype, q.shape[4]).forward
    along = triton.cdiv(queries, blocks.m)
    group = triton.cdiv(along, bias_groups(bias, 2, blocks.m))
    some = out if gate is None else gate
    forward[batch * heads * along * triton.cdiv(rows, ROWS),](
        q, k, v, bias, some, out, lse, rows, heads, queries, k.shape[3], group,
        *strides(q, k, v, some, out), *bias.stride()[:3],
        ROWS=ROWS, GATED=gate is not None, **common(q, blocks),
    )  # fmt: skip
