"""Attention of the diffusion transformer: tokens attend to tokens, with a bias that stays where it is.

AlphaFold 3, Algorithm 24, for M samples of noise that share one bias. The tokens of the samples are sharded over all
P = R C ranks; the bias is a tile and never moves. In four steps, for one group of samples after the other:

    shards of q, k, v -> the tile's rows of q, and its columns of k and v     ``rows``, ``cols``
    attention of these rows to these columns, with the log-sum-exp            local
    results of the C tiles of a grid row -> the shards of these tokens        ``results``
    merge by the log-sum-exp                                                  local

Each rank sends about (2 / R + 2 / C) M N c elements forward, c = h d, and (3 / R + 4 / C) M N c backward. Gathered rows
and columns would shrink only as 1 / R and 1 / C. So the samples come in about R + C groups, the next one travelling
while one is worked on, and a rank holds no more than O(M N c / P); in the backward pass they come again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpfold_train.kernels.partial_attention import partial_attention, partial_gradients
from cpfold_train.kernels.regions import region
from cpfold_train.ops.stream import in_turn
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.exchange_plan import ExchangePlan, GradInFlight, InFlight
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import col_parts, in_one_dim

OP = "token_attention"
TOKENS = 4
"""The dim of tokens in what travels: (several tensors, B, samples, h, tokens, ...)."""


def token_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cp: ContextParallel) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` over all N tokens j, for each sample and head; the softmax is in fp32 at
    least.

    Args:
        q: (B*M, N/P, h, d) queries of this rank's shard of the tokens, already scaled; the M samples of one element of
            the batch follow each other.
        k, v: (B*M, N/P, h, d) of the same tokens.
        bias: tile (B, h, N/R, N/C), the same for the M samples; very negative where a key is masked.
        cp: the running grid.

    Returns:
        (B*M, N/P, h, d) of this rank's shard.
    """
    batch = bias.shape[0]
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(2, 3) for x in (q, k, v))
    return _TokenAttention.apply(q, k, v, bias, cp).transpose(2, 3).flatten(0, 1)


class _Plans(NamedTuple):
    """From shards of tokens to the tile's rows and to its columns, and from what each rank of a grid row found for the
    tile's rows to what all of them found for a shard."""

    rows: ExchangePlan
    cols: ExchangePlan
    results: ExchangePlan


def _plans(q: Tensor, cp: ContextParallel) -> _Plans:
    grid, n = cp.grid, q.shape[3] * cp.grid.cp_size
    shards, tile_rows = split(n, grid.cp_size), grid.row_tokens(n)
    # The tile's rows are the shards of the ranks of its grid row.
    of_row = shards[grid.row * grid.cols : (grid.row + 1) * grid.cols]
    found = tuple(((col, col + 1), tile_rows) for col in range(grid.cols))
    wanted = tuple(((0, grid.cols), shard) for shard in of_row)
    return _Plans(
        ExchangePlan(cp, cp.col, (TOKENS,), in_one_dim(of_row), in_one_dim((tile_rows,) * grid.cols), OP),
        ExchangePlan(cp, cp.all, (TOKENS,), in_one_dim(shards), in_one_dim(col_parts(grid, n)), OP),
        ExchangePlan(cp, cp.col, (0, TOKENS), found, wanted, OP),
    )


def _sample_groups(q: Tensor, cp: ContextParallel) -> list[slice]:
    """The samples of ``q`` (B, M, ...) that travel at a time."""
    most = 1 if cp.grid.cp_size == 1 else cp.grid.rows + cp.grid.cols
    return [slice(*group) for group in split(q.shape[1], min(q.shape[1], most))]


class _TokenAttention(torch.autograd.Function):
    """Of queries, keys and values (B, M, h, N/P, d)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cp: ContextParallel) -> Tensor:
        plans, groups = _plans(q, cp), _sample_groups(q, cp)
        # Laid out for what follows in the model, which wants tokens before heads.
        out = torch.empty_like(q.transpose(2, 3), memory_format=torch.contiguous_format).transpose(2, 3)
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(bias.dtype, torch.float32))

        def send(group: int) -> list[InFlight]:
            some = groups[group]
            return [
                plans.rows.send_forward(q[None, :, some]),
                plans.cols.send_forward(torch.stack([k[:, some], v[:, some]])),
            ]

        def merge(some: slice, results: list[InFlight]) -> None:
            out[:, some], lse[:, some] = _merged(*(flight.wait() for flight in results))

        # A group's results travel while the next group attends.
        before: tuple[slice, list[InFlight]] | None = None
        for some, ((q_rows,), (k_cols, v_cols)) in zip(groups, in_turn(len(groups), send)):
            found = partial_attention(q_rows, k_cols, v_cols, bias, cp.kernels)
            if before:
                merge(*before)
            before = some, [plans.results.send_forward(x[None]) for x in found]
            del q_rows, k_cols, v_cols, found
        merge(*before)
        ctx.cp = cp
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, out, lse = ctx.saved_tensors
        plans, groups, kernels = _plans(q, ctx.cp), _sample_groups(q, ctx.cp), ctx.cp.kernels
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=lse.dtype)

        def send(group: int) -> list[InFlight]:
            some = groups[group]
            delta = (grad[:, some] * out[:, some]).sum(-1, dtype=lse.dtype)
            return [
                plans.rows.send_forward(torch.stack([q[:, some], grad[:, some]])),
                plans.rows.send_forward(torch.stack([lse[:, some], delta])),
                plans.cols.send_forward(torch.stack([k[:, some], v[:, some]])),
            ]

        def store(some: slice, rows: GradInFlight, cols: GradInFlight) -> None:
            (dq[:, some],) = rows.wait()
            dk[:, some], dv[:, some] = cols.wait()

        # A group's gradients travel while those of the next group are computed.
        before: tuple[slice, GradInFlight, GradInFlight] | None = None
        turns = zip(groups, in_turn(len(groups), send))
        for some, ((q_rows, grad_rows), (lse_rows, delta_rows), (k_cols, v_cols)) in turns:
            dq_rows = torch.zeros_like(q_rows, dtype=lse.dtype)
            dkv_cols = partial_gradients(
                q_rows, k_cols, v_cols, bias, grad_rows, lse_rows, delta_rows, dq_rows, dbias, kernels
            )
            if before:
                store(*before)
            dq_rows, dkv_cols = dq_rows[None].to(q.dtype), torch.stack(dkv_cols).to(k.dtype)
            before = some, plans.rows.send_grad(dq_rows), plans.cols.send_grad(dkv_cols)
            del q_rows, grad_rows, k_cols, v_cols, dq_rows, dkv_cols
        store(*before)
        return dq, dk, dv, dbias.to(bias.dtype), None


@region
def _merged(parts: Tensor, part_lses: Tensor) -> tuple[Tensor, Tensor]:
    """Results (C, ..., d) over the keys of C ranks and their log-sum-exp (C, ...), to those over all keys."""
    lse = part_lses.logsumexp(0)
    weights = (part_lses - lse).exp()[..., None].to(parts.dtype)
    return (parts * weights).sum(0), lse
