"""Attention with an additive bias, backward: one kernel for the gradients of queries, keys and values.

There is a program for each multiprocessor, and it takes one head of one row after the other: a block of BLOCK_N keys at
a time, and for each all queries. ``dk`` and ``dv`` of the block stay in registers, ``dq`` is added up in memory of the
program's own, in fp32. There are no atomics, and results are the same from run to run. Beside the two kernels of
:mod:`~cpfold_train.kernels.triton.attention_backward` that it replaces, it computes the weights once instead of twice:
five products of ``2 d`` operations and one exponential a score instead of seven and two, and at width 32 on sm_90 10.2
instructions instead of 17.8.

Bytes. A score takes ``4 d / BLOCK_N`` for queries and their gradient, and ``8 d / BLOCK_N`` to add to ``dq``: 1.5 at
d = 32 and 256 keys. A program comes back to them a block of keys later, when all programs have read theirs, which is
more than an L2 holds: they come from HBM. The bias takes 2 bytes from L2, since programs that run together are at rows
of the same head.

Nothing in the inner loop is masked. The bias is a copy with queries along its rows, filled up with ``-inf`` to whole
blocks. Rows and blocks of keys are one loop, not two: so the pointers of the row are computed again for each block,
instead of taking the registers that the products want.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.attention_operators import Blocks
from cpfold_train.kernels.triton.attention import LOG2E, common, strides, tile, typical, widened

INTERPRETED_PROGRAMS = 2


@triton.jit
def joined(
    q, k, v, bias, grad, lse, delta, sums, dq, dk, dv, batch, rows, heads, M, N,
    q_batch, q_row, q_head, q_token, k_batch, k_row, k_head, k_token, v_batch, v_row, v_head, v_token,
    grad_batch, grad_row, grad_head, grad_token, dq_batch, dq_row, dq_head, dq_token,
    dk_batch, dk_row, dk_head, dk_token, dv_batch, dv_row, dv_head, dv_token,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``bias`` (B, h, N, M), ``lse`` and ``delta`` (B, r, h, M), ``sums`` (programs, M, PADDED) have whole blocks."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    along_m = tl.cdiv(M, BLOCK_M) * BLOCK_M
    d = tl.arange(0, PADDED)
    sums += tl.program_id(0).to(tl.int64) * along_m * PADDED
    mine = tl.cdiv(batch * heads * rows - tl.program_id(0), tl.num_programs(0))
    for turn in range(0, mine * blocks_n):
        row = tl.program_id(0) + turn // blocks_n * tl.num_programs(0)
        first = turn % blocks_n * BLOCK_N
        batch_head, r = row // rows, (row % rows).to(tl.int64)
        b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
        n = first + tl.arange(0, BLOCK_N)
        n_in = tl.minimum(n, N - 1)
        k_n = tile(k + b * k_batch + r * k_row + h * k_head, n_in, k_token, WIDTH, PADDED).to(DOT)
        v_n = tile(v + b * v_batch + r * v_row + h * v_head, n_in, v_token, WIDTH, PADDED).to(DOT)
        dk_n = tl.zeros([BLOCK_N, PADDED], tl.float32)
        dv_n = tl.zeros([BLOCK_N, PADDED], tl.float32)
        bias_n = bias + (b * heads + h) * along_m * (blocks_n * BLOCK_N) + n[:, None] * along_m
        q_r = q + b * q_batch + r * q_row + h * q_head
        grad_r = grad + b * grad_batch + r * grad_row + h * grad_head
        at = ((b * rows + r) * heads + h) * along_m
        for start in tl.range(0, M, BLOCK_M, num_stages=1):
            m = start + tl.arange(0, BLOCK_M)
            m_in = tl.minimum(m, M - 1)
            q_m = tile(q_r, m_in, q_token, WIDTH, PADDED).to(DOT)
            grad_m = tile(grad_r, m_in, grad_token, WIDTH, PADDED).to(DOT)
            scores = tl.dot(k_n, tl.trans(q_m), acc=widened(tl.load(bias_n + m[None, :])), input_precision=PRECISION)
            weights = tl.exp2(scores * LOG2E - tl.load(lse + at + m)[None, :])
            dv_n = tl.dot(weights.to(DOT), grad_m, acc=dv_n, input_precision=PRECISION)
            dweights = tl.dot(v_n, tl.trans(grad_m), input_precision=PRECISION)
            # Read no sooner than this, delta takes no registers that the products want.
            dscores = (weights * (dweights - tl.load(delta + at + m)[None, :])).to(DOT)
            dk_n = tl.dot(dscores, q_m, acc=dk_n, input_precision=PRECISION)
            sums_m = sums + m[:, None] * PADDED + d[None, :]
            dq_m = tl.load(sums_m, mask=(m >= 0)[:, None] & (first > 0), other=0.0)
            tl.store(sums_m, tl.dot(tl.trans(dscores), k_n, acc=dq_m, input_precision=PRECISION))
        inside_n = (n < N)[:, None] & (d < WIDTH)[None, :]
        dk_r = dk + b * dk_batch + r * dk_row + h * dk_head + n[:, None] * dk_token + d[None, :]
        tl.store(dk_r, dk_n.to(dk.dtype.element_ty), mask=inside_n)
        dv_r = dv + b * dv_batch + r * dv_row + h * dv_head + n[:, None] * dv_token + d[None, :]
        tl.store(dv_r, dv_n.to(dv.dtype.element_ty), mask=inside_n)
        # What some threads have stored others read: before the next block of keys, and before the next row.
        tl.debug_barrier()
        if first + BLOCK_N >= N:
            for start in range(0, M, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                total = tl.load(sums + m[:, None] * PADDED + d[None, :])
                dq_r = dq + b * dq_batch + r * dq_row + h * dq_head + m[:, None] * dq_token + d[None, :]
                tl.store(dq_r, total.to(dq.dtype.element_ty), mask=(m < M)[:, None] & (d < WIDTH)[None, :])
            tl.debug_barrier()


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
    add: bool,
    blocks: Blocks,
) -> None:
    """Run :func:`joined`; ``lse`` in base 2, all else as for
    :func:`cpfold_train.kernels.attention_operators.attention_backward`."""
    batch, rows, heads, at_m, _ = q.shape
    at_n, sizes = k.shape[3], common(q, blocks)
    more_m, more_n = -at_m % blocks.m, -at_n % blocks.n
    turned = F.pad(bias.mT, (0, more_m, 0, more_n), value=float("-inf")).contiguous()
    on_gpu = q.device.type == "cuda"
    most = torch.cuda.get_device_properties(q.device).multi_processor_count if on_gpu else INTERPRETED_PROGRAMS
    programs = min(most, batch * rows * heads)
    sums = lse.new_empty(programs, at_m + more_m, sizes["PADDED"])
    found = torch.empty_like(dq) if add else dq
    joined[programs,](
        q, k, v, turned, grad, F.pad(lse, (0, more_m)), F.pad(delta, (0, more_m)), sums, found, dk, dv,
        batch, rows, heads, at_m, at_n, *strides(q, k, v, grad, found, dk, dv), **sizes,
    )  # fmt: skip
    if add:
        dq += found


LAUNCHES = typical("attention, gradients of queries, keys and values", joined, "joined", {})
