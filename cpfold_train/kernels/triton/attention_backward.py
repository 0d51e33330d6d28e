"""Attention with an additive bias, backward: kernels that each compute the weights again from the log-sum-exp.

``p = exp(s - lse)``, ``ds = p (grad v^T - delta)``; ``delta`` is the product of the result and its gradient. ``lse``
and ``delta`` are those over all keys, of which these may be a part.

- keys: a program owns BLOCK_N keys of ROWS rows and goes over all queries; ``dv += p^T grad``, ``dk += ds^T q``. Scores
  are transposed, so that weights are the register operand of their products, without shuffles.
- queries: a program owns BLOCK_M queries of ROWS rows and goes over all keys; ``dq += ds k``.
- bias: a program owns a tile of the bias and goes over all rows, or a part of them where there are too few tiles to
  fill the GPU; the sum of ``ds`` stays in registers. All rows have the same bias b there, so that it leaves the sum:
  ``dbias = exp(b - top) sum exp(q k^T - (lse - top)) (grad v^T - delta)``, where ``top`` is the highest bias of the
  query. That takes neither registers for the bias nor instructions in the loop. No sum overflows: a weight is one at
  most, so that what is left of it is at most ``exp(top - b)``.

There are no atomics: results are the same from run to run.

Each computes one exponential a score, and 4, 3 and 2 products of ``2 d`` operations. The first two are ordered like the
forward pass, by :func:`~cpfold_train.kernels.triton.attention.place`, so that their bias comes from HBM once. From L2
a score takes ``2 / ROWS`` bytes of bias and ``4 d`` over the tile's side that stays, in bf16; in the kernel for the
bias, which holds its tile, ``4 d (1 / BLOCK_M + 1 / BLOCK_N)``. Beside the exponentials it is this and the number of
instructions that bound them: as compiled for sm_90 at width 32, 9.7, 8.1 and 6.1 a score, and 2.1, 1.5 and 2.1 bytes.

On Hopper one kernel stands for the first two where heads are narrow and rows many:
:mod:`~cpfold_train.kernels.triton.attention_joined`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.attention_operators import BIAS_TILES, bias_groups, joined_blocks, padded, tiling
from cpfold_train.kernels.triton.attention import LOG2E, TYPES, common, place, strides, tile, typical, widened
from cpfold_train.kernels.triton.attention_joined import launch as launch_joined
from cpfold_train.kernels.triton.launches import Launch

START_TOKENS = 128
"""Queries of a program of :func:`start`."""
NEGLIGIBLE = tl.constexpr(1e-30)
"""Keys whose bias is 69 or more below the query's highest, so that ``exp`` of the difference is less than this, count
as masked in the gradient of the bias. Above it, what is summed stays far from the largest number of fp32."""
PROGRAMS = 512
"""Tiles of the bias that fill a GPU; where there are fewer, rows are taken in parts."""


@triton.jit
def _store(to, found, at, token, stop, ADD: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the gradients of the tokens ``at`` before ``stop``, or add them to what is there."""
    d = tl.arange(0, PADDED)
    inside = (at < stop)[:, None] & (d < WIDTH)[None, :]
    to += at[:, None] * token + d[None, :]
    if ADD:
        found += tl.load(to, mask=inside, other=0.0)
    tl.store(to, found.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _add_queries(
    k, v, q, grad, bias_t, lse, delta, dk, dv, m, q_token, grad_token, M,
    LAST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values with another block of queries added; LAST may have fewer than a block."""
    m_in = tl.minimum(m, M - 1) if LAST else m
    lse_m, delta_m = tl.load(lse + m_in), tl.load(delta + m_in)
    if LAST:
        # exp2(-inf): queries that are not there weigh nothing.
        lse_m = tl.where(m < M, lse_m, float("inf"))
    q_m = tile(q, m_in, q_token, WIDTH, PADDED).to(DOT)
    grad_m = tile(grad, m_in, grad_token, WIDTH, PADDED).to(DOT)
    scores = tl.dot(k, tl.trans(q_m), acc=bias_t, input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(grad_m), input_precision=PRECISION)
    weights = tl.exp2(scores * LOG2E - lse_m[None, :])
    dv = tl.dot(weights.to(DOT), grad_m, acc=dv, input_precision=PRECISION)
    dscores = weights * (dweights - delta_m[None, :])
    dk = tl.dot(dscores.to(DOT), q_m, acc=dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys(
    q, k, v, bias, grad, lse, delta, dk, dv, rows, heads, M, N, group,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    grad_batch, grad_row, grad_head, grad_token, dk_batch, dk_row, dk_head, dk_token,
    dv_batch, dv_row, dv_head, dv_token, bias_batch, bias_head, bias_query, bias_key,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one head in ROWS rows a program, over all queries."""
    batch_head, pair, block = place(tl.program_id(0), tl.cdiv(N, BLOCK_N), group, tl.cdiv(rows, ROWS))
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    r0 = (pair * ROWS).to(tl.int64)
    r1 = tl.minimum(r0 + ROWS - 1, rows - 1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1)
    q += b * q_batch + h * q_head
    grad += b * grad_batch + h * grad_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    at0, at1 = ((b * rows + r0) * heads + h) * M, ((b * rows + r1) * heads + h) * M
    bias_columns = bias + b * bias_batch + h * bias_head + (n_in * bias_key)[:, None]
    q0, grad0, q1, grad1 = q + r0 * q_row, grad + r0 * grad_row, q + r1 * q_row, grad + r1 * grad_row
    lse0, delta0, lse1, delta1 = lse + at0, delta + at0, lse + at1, delta + at1
    k0 = tile(k + r0 * k_row, n_in, k_token, WIDTH, PADDED).to(DOT)
    v0 = tile(v + r0 * v_row, n_in, v_token, WIDTH, PADDED).to(DOT)
    dk0 = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dv0 = tl.zeros([BLOCK_N, PADDED], tl.float32)
    if ROWS == 2:
        k1 = tile(k + r1 * k_row, n_in, k_token, WIDTH, PADDED).to(DOT)
        v1 = tile(v + r1 * v_row, n_in, v_token, WIDTH, PADDED).to(DOT)
        dk1, dv1 = dk0, dv0
    full = M // BLOCK_M * BLOCK_M
    # With stages of its own, a loop copies the bias to shared memory ahead of time too, not only what products take.
    for start in tl.range(0, full, BLOCK_M, num_stages=STAGES):
        m = start + tl.arange(0, BLOCK_M)
        bias_t = widened(tl.load(bias_columns + (m * bias_query)[None, :]))
        dk0, dv0 = _add_queries(
            k0, v0, q0, grad0, bias_t, lse0, delta0, dk0, dv0, m, q_token, grad_token, M,
            False, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
        if ROWS == 2:
            dk1, dv1 = _add_queries(
                k1, v1, q1, grad1, bias_t, lse1, delta1, dk1, dv1, m, q_token, grad_token, M,
                False, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    # Loops of at most one turn: see the forward kernel.
    for start in tl.range(full, M, BLOCK_M, num_stages=1):
        m = start + tl.arange(0, BLOCK_M)
        bias_t = widened(tl.load(bias_columns + (tl.minimum(m, M - 1) * bias_query)[None, :]))
        dk0, dv0 = _add_queries(
            k0, v0, q0, grad0, bias_t, lse0, delta0, dk0, dv0, m, q_token, grad_token, M,
            True, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
    if ROWS == 2:
        for start in tl.range(full, M, BLOCK_M, num_stages=1):
            m = start + tl.arange(0, BLOCK_M)
            bias_t = widened(tl.load(bias_columns + (tl.minimum(m, M - 1) * bias_query)[None, :]))
            dk1, dv1 = _add_queries(
                k1, v1, q1, grad1, bias_t, lse1, delta1, dk1, dv1, m, q_token, grad_token, M,
                True, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    dk += b * dk_batch + h * dk_head
    dv += b * dv_batch + h * dv_head
    _store(dk + r0 * dk_row, dk0, n, dk_token, N, False, WIDTH, PADDED)
    _store(dv + r0 * dv_row, dv0, n, dv_token, N, False, WIDTH, PADDED)
    if ROWS == 2:
        stop = tl.where(r0 + 1 < rows, N, 0)
        _store(dk + r1 * dk_row, dk1, n, dk_token, stop, False, WIDTH, PADDED)
        _store(dv + r1 * dv_row, dv1, n, dv_token, stop, False, WIDTH, PADDED)


@triton.jit
def _dscores(q, k, v, grad, bias, lse, delta, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of scores (queries, keys)."""
    scores = tl.dot(q, tl.trans(k), acc=bias, input_precision=PRECISION)
    dweights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return tl.exp2(scores * LOG2E - lse[:, None]) * (dweights - delta[:, None])


@triton.jit
def _add_keys(
    q, grad, k, v, bias, lse, delta, dq, n, k_token, v_token, N,
    LAST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of some queries with another block of keys added; LAST may have fewer than a block."""
    n_in = tl.minimum(n, N - 1) if LAST else n
    if LAST:
        bias = tl.where((n < N)[None, :], bias, -float("inf"))
    k_n = tile(k, n_in, k_token, WIDTH, PADDED).to(DOT)
    v_n = tile(v, n_in, v_token, WIDTH, PADDED).to(DOT)
    dscores = _dscores(q, k_n, v_n, grad, bias, lse, delta, DOT, PRECISION)
    return tl.dot(dscores.to(DOT), k_n, acc=dq, input_precision=PRECISION)


@triton.jit
def queries(
    q, k, v, bias, grad, lse, delta, dq, rows, heads, M, N, group,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    grad_batch, grad_row, grad_head, grad_token, dq_batch, dq_row, dq_head, dq_token,
    bias_batch, bias_head, bias_query, ADD: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head a program, over all keys."""
    batch_head, pair, block = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), group, tl.cdiv(rows, ROWS))
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    r0 = (pair * ROWS).to(tl.int64)
    r1 = tl.minimum(r0 + ROWS - 1, rows - 1)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, M - 1)
    q += b * q_batch + h * q_head
    grad += b * grad_batch + h * grad_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    k0, v0, k1, v1 = k + r0 * k_row, v + r0 * v_row, k + r1 * k_row, v + r1 * v_row
    bias_rows = bias + b * bias_batch + h * bias_head + (m_in * bias_query)[:, None]
    at = ((b * rows + r0) * heads + h) * M
    q0 = tile(q + r0 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
    grad0 = tile(grad + r0 * grad_row, m_in, grad_token, WIDTH, PADDED).to(DOT)
    lse0, delta0 = tl.load(lse + at + m_in), tl.load(delta + at + m_in)
    dq0 = tl.zeros([BLOCK_M, PADDED], tl.float32)
    if ROWS == 2:
        at = ((b * rows + r1) * heads + h) * M
        q1 = tile(q + r1 * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
        grad1 = tile(grad + r1 * grad_row, m_in, grad_token, WIDTH, PADDED).to(DOT)
        lse1, delta1 = tl.load(lse + at + m_in), tl.load(delta + at + m_in)
        dq1 = dq0
    full = N // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        bias_mn = widened(tl.load(bias_rows + n[None, :]))
        dq0 = _add_keys(
            q0, grad0, k0, v0, bias_mn, lse0, delta0, dq0, n, k_token, v_token, N,
            False, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
        if ROWS == 2:
            dq1 = _add_keys(
                q1, grad1, k1, v1, bias_mn, lse1, delta1, dq1, n, k_token, v_token, N,
                False, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    # Loops of at most one turn: see the forward kernel.
    for start in tl.range(full, N, BLOCK_N, num_stages=1):
        n = start + tl.arange(0, BLOCK_N)
        bias_mn = widened(tl.load(bias_rows + tl.minimum(n, N - 1)[None, :]))
        dq0 = _add_keys(
            q0, grad0, k0, v0, bias_mn, lse0, delta0, dq0, n, k_token, v_token, N,
            True, WIDTH, PADDED, DOT, PRECISION,
        )  # fmt: skip
    if ROWS == 2:
        for start in tl.range(full, N, BLOCK_N, num_stages=1):
            n = start + tl.arange(0, BLOCK_N)
            bias_mn = widened(tl.load(bias_rows + tl.minimum(n, N - 1)[None, :]))
            dq1 = _add_keys(
                q1, grad1, k1, v1, bias_mn, lse1, delta1, dq1, n, k_token, v_token, N,
                True, WIDTH, PADDED, DOT, PRECISION,
            )  # fmt: skip
    dq += b * dq_batch + h * dq_head
    _store(dq + r0 * dq_row, dq0, m, dq_token, M, ADD, WIDTH, PADDED)
    if ROWS == 2:
        _store(dq + r1 * dq_row, dq1, m, dq_token, tl.where(r0 + 1 < rows, M, 0), ADD, WIDTH, PADDED)


@triton.jit
def of_bias(
    q, k, v, bias, bias_max, grad, lse, delta, dbias, rows, heads, M, N, rows_each,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    grad_batch, grad_row, grad_head, grad_token, bias_batch, bias_head, bias_query, part_size,
    GROUP: tl.constexpr, ADD: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dbias`` (parts, B, h, M, N): part p adds up rows from ``p rows_each`` to before ``(p + 1) rows_each``."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Programs that run together share what they read.
    batch_head, block_n, block_m = place(tl.program_id(0), tiles_m, GROUP, tiles_n)
    part = tl.program_id(1)
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, n_in = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    first = part * rows_each
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    grad += b * grad_batch + h * grad_head
    bias_max_m = tl.load(bias_max + (b * heads + h) * M + m_in).to(tl.float32) * LOG2E
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in tl.range(first, tl.minimum(first + rows_each, rows), num_stages=STAGES):
        r = tl.cast(row, tl.int64)
        q_m = tile(q + r * q_row, m_in, q_token, WIDTH, PADDED).to(DOT)
        grad_m = tile(grad + r * grad_row, m_in, grad_token, WIDTH, PADDED).to(DOT)
        k_n = tile(k + r * k_row, n_in, k_token, WIDTH, PADDED).to(DOT)
        v_n = tile(v + r * v_row, n_in, v_token, WIDTH, PADDED).to(DOT)
        at = ((b * rows + r) * heads + h) * M
        lse_m, delta_m = tl.load(lse + at + m_in) - bias_max_m, tl.load(delta + at + m_in)
        total += _dscores(q_m, k_n, v_n, grad_m, None, lse_m, delta_m, DOT, PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    bias_mn = tl.load(
        bias + b * bias_batch + h * bias_head + (m * bias_query)[:, None] + n[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    factor = tl.exp2(bias_mn * LOG2E - bias_max_m[:, None])
    total = tl.where(factor > NEGLIGIBLE, total * factor, 0.0)
    to = dbias + part.to(tl.int64) * part_size + (b * heads + h) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0.0)
    tl.store(to, total, mask=inside)


@triton.jit
def start(
    grad, out, gate, dgate, delta, before, rows, heads, M,
    grad_batch, grad_row, grad_head, grad_token, out_batch, out_row, out_head, out_token,
    gate_batch, gate_row, gate_head, gate_token, dgate_batch, dgate_row, dgate_head, dgate_token,
    before_batch, before_row, before_head, before_token,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """``delta``, and back through the gate: with ``out`` gated, ``delta = grad . out`` is the same before and after."""
    head_row = tl.program_id(1)
    h, r, b = head_row % heads, (head_row // heads % rows).to(tl.int64), (head_row // (heads * rows)).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, M - 1)
    d = tl.arange(0, PADDED)
    grad += b * grad_batch + r * grad_row + h * grad_head
    out += b * out_batch + r * out_row + h * out_head
    grad_m = tile(grad, m_in, grad_token, WIDTH, PADDED).to(tl.float32)
    product = grad_m * tile(out, m_in, out_token, WIDTH, PADDED).to(tl.float32)
    tl.store(delta + head_row.to(tl.int64) * M + m, tl.sum(product, 1), mask=m < M)
    if GATED:
        inside = (m < M)[:, None] & (d < WIDTH)[None, :]
        gate += b * gate_batch + r * gate_row + h * gate_head
        passed = tl.sigmoid(tile(gate, m_in, gate_token, WIDTH, PADDED).to(tl.float32))
        dgate += b * dgate_batch + r * dgate_row + h * dgate_head
        before += b * before_batch + r * before_row + h * before_head
        dgate_m, before_m = product * (1.0 - passed), grad_m * passed
        tl.store(dgate + m[:, None] * dgate_token + d[None, :], dgate_m.to(dgate.dtype.element_ty), mask=inside)
        tl.store(before + m[:, None] * before_token + d[None, :], before_m.to(before.dtype.element_ty), mask=inside)


def launch_delta(
    grad: Tensor, out: Tensor, gate: Tensor | None, dgate: Tensor | None, delta: Tensor, before: Tensor
) -> None:
    """Run :func:`start`."""
    batch, rows, heads, queries, width = grad.shape
    some = (out, out, out) if gate is None else (gate, dgate, before)
    start[triton.cdiv(queries, START_TOKENS), batch * rows * heads](
        grad, out, *some[:2], delta, some[2], rows, heads, queries, *strides(grad, out, *some),
        WIDTH=width, PADDED=padded(width), BLOCK_M=START_TOKENS, GATED=gate is not None, num_warps=4,
    )  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    add: bool,
) -> None:
    """Run the kernels on what :func:`cpfold_train.kernels.attention_operators.attention_backward` takes."""
    batch, rows, heads, at_m, _ = q.shape
    at_n, sizes = k.shape[3], tiling(q)
    # All three take exponentials in base 2.
    lse, delta, given = (lse * LOG2E.value).contiguous(), delta.contiguous(), strides(q, k, v, grad)

    if blocks := joined_blocks(q):
        launch_joined(q, k, v, bias, grad, lse, delta, dq, dk, dv, add, blocks)
    else:
        blocks = sizes.keys
        along = triton.cdiv(at_n, blocks.n)
        # Its scores are transposed, and so is the bias that they start from.
        turned = bias.mT.contiguous().mT
        keys[batch * heads * along * triton.cdiv(rows, blocks.rows),](
            q, k, v, turned, grad, lse, delta, dk, dv, rows, heads, at_m, at_n,
            triton.cdiv(along, bias_groups(bias, 3, blocks.n)),
            *given, *strides(dk, dv), *turned.stride(),
            ROWS=blocks.rows, STAGES=blocks.stages, **common(q, blocks),
        )  # fmt: skip
        del turned

        blocks = sizes.queries
        along = triton.cdiv(at_m, blocks.m)
        queries[batch * heads * along * triton.cdiv(rows, blocks.rows),](
            q, k, v, bias, grad, lse, delta, dq, rows, heads, at_m, at_n,
            triton.cdiv(along, bias_groups(bias, 2, blocks.m)),
            *given, *strides(dq), *bias.stride()[:3],
            ADD=add, ROWS=blocks.rows, STAGES=blocks.stages, **common(q, blocks),
        )  # fmt: skip

    blocks = sizes.bias
    tiles = batch * heads * triton.cdiv(at_m, blocks.m) * triton.cdiv(at_n, blocks.n)
    rows_each = triton.cdiv(rows, min(rows, triton.cdiv(PROGRAMS, tiles)))
    parts = triton.cdiv(rows, rows_each)
    direct = parts == 1 and dbias.is_contiguous()
    into = dbias if direct else dbias.new_empty(parts, *dbias.shape)
    bias_max = bias.amax(3)
    of_bias[tiles, parts](
        q, k, v, bias, bias_max, grad, lse, delta, into, rows, heads, at_m, at_n, rows_each,
        *given, *bias.stride()[:3], dbias.numel(),
        GROUP=BIAS_TILES, ADD=direct, STAGES=blocks.stages, **common(q, blocks),
    )  # fmt: skip
    if not direct:
        dbias += into.sum(0)


LAUNCHES = [
    # As launched: a transposed copy of the bias has contiguous queries.
    *typical("attention, gradients of keys", keys, "keys", {"bias_query": 1}),
    *typical("attention, gradient of queries", queries, "queries", {"ADD": False}),
    *typical("attention, gradient of the bias", of_bias, "bias", {"GROUP": BIAS_TILES, "ADD": True}),
    *(
        Launch(
            f"attention, delta and gate, width {width}",
            start,
            {arg: TYPES.get(arg, "i32") for arg in start.arg_names if not arg.isupper() or arg == "M"},
            {"WIDTH": width, "PADDED": padded(width), "BLOCK_M": START_TOKENS, "GATED": True},
            4,
            1,
        )
        for width in (32, 48)
    ),
]
