"""Attention with an additive bias in plain torch, without ever holding the scores: the one loop, forward and backward.

The scores of complete rows are (B, r, h, N, N). They are computed for some rows and some queries at a time, and again
in the backward pass (Dao et al., "FlashAttention", NeurIPS 2022). Unlike torch's fused CPU kernel this gives the
gradient of the bias. Queries are the outer loop, so that their part of the bias and of its gradient stays in cache for
all rows.

The keys at hand may be all keys or some of them. Results over some keys merge by the log-sum-exp of their scores (lse),
which the backward pass is then given.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from cpfold_train.dry_run import each_block
from cpfold_train.kernels.by_rows import rows_per_block

SCORE_BYTES = 1 << 19
"""Scores that a CPU thread takes at a time: it goes over them ten times, so they should fit in its core's cache."""


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` over the keys at hand, and the log-sum-exp of the scores.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked.
        with_lse: compute the log-sum-exp, which takes a tenth of the time.

    Returns:
        (B, r, h, M, d) in the dtype of ``q``, and (B, r, h, M) in fp32 at least, or None. Without gradient.
    """
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=_acc_dtype(bias)) if with_lse else None
    for r, i in score_blocks(q, bias):
        scores = _scores(q[:, r, :, i], k[:, r], bias[:, :, i])
        row_max = scores.amax(-1) if with_lse else None
        weights = torch.softmax(scores, -1, out=scores)
        if with_lse:
            # The largest weight is exp(row_max - lse), and never below 1 / N.
            lse[:, r, :, i] = row_max - weights.amax(-1).log()
        out[:, r, :, i] = weights.to(v.dtype) @ v[:, r]
    return out, lse


def blockwise_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    grad: Tensor,
    dq: Tensor,
    dbias: Tensor,
    lse: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward pass of :func:`blockwise_attention`, computing the scores again.

    Args:
        q, k, v, bias: as there.
        grad: (B, r, h, M, d) gradient of the result over all keys.
        dq: gradient of ``q``, to which that of these keys is added in place; where they are not all, fp32 at least.
        dbias: gradient of ``bias`` in fp32 at least, to which that of these keys is added in place.
        lse: (B, r, h, M) log-sum-exp over all keys; None where those at hand are all.
        delta: (B, r, h, M) products of ``grad`` and the result over all keys; None likewise.

    Returns:
        Gradients of ``k`` and ``v``, fp32 at least.
    """
    acc_dtype = dbias.dtype
    # Transposed: the product of a thin matrix with a wide one is several times faster than the other way around.
    dk, dv = (torch.zeros_like(x.mT, dtype=acc_dtype, memory_format=torch.contiguous_format) for x in (k, v))
    for r, i in score_blocks(q, bias):
        q_i, g_i = q[:, r, :, i], grad[:, r, :, i]
        scores = _scores(q_i, k[:, r], bias[:, :, i])
        weights = torch.softmax(scores, -1, out=scores) if lse is None else scores.sub_(lse[:, r, :, i, None]).exp_()
        dv[:, r] += g_i.mT @ weights.to(g_i.dtype)
        dscores = (g_i @ v[:, r].mT).to(acc_dtype)
        # d score_ij = weight_ij (d weight_ij - sum_k weight_ik d weight_ik), and the sum over all keys is delta_i.
        if delta is None:
            torch._softmax_backward_data(dscores, weights, -1, acc_dtype, grad_input=dscores)
        else:
            dscores.sub_(delta[:, r, :, i, None]).mul_(weights)
        for row in dscores.unbind(1):
            dbias[:, :, i] += row
        dscores = dscores.to(q.dtype)
        dq[:, r, :, i] += dscores @ k[:, r]
        dk[:, r] += q_i.mT @ dscores
    return dk.mT, dv.mT


def score_blocks(q: Tensor, bias: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and queries of ``q`` (B, r, h, M, d) to take at a time, for scores with a bias (B, h, M, N)."""
    score_bytes = bias[:, :, 0].numel() * max(4, bias.element_size())
    cpu_bytes = SCORE_BYTES * torch.get_num_threads()
    queries = _even(bias.shape[2], max(16, rows_per_block(score_bytes, q.device, cpu_bytes)))
    rows = _even(q.shape[1], rows_per_block(score_bytes * queries, q.device, cpu_bytes))
    blocks = (
        (slice(row, row + rows), slice(first, first + queries))
        for first in range(0, bias.shape[2], queries)
        for row in range(0, q.shape[1], rows)
    )
    return each_block(blocks, lambda block: prod(part.stop - part.start for part in block))


def _even(total: int, most: int) -> int:
    """Size of the fewest equal parts of ``total`` that have at most ``most``."""
    parts = -(-total // most)
    return -(-total // parts)


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """(B, rows, h, queries, N) in fp32 at least."""
    return (q @ k.mT).to(_acc_dtype(bias)).add_(bias[:, None])


def _acc_dtype(bias: Tensor) -> torch.dtype:
    return torch.promote_types(bias.dtype, torch.float32)
