"""Attention of the diffusion transformer: tokens attend to tokens, with the bias of the pair representation in place.

AlphaFold 3, Algorithm 24, for M samples of noise that share one bias. The samples' tokens are shared out over all
P = R C ranks; the bias is a tile and never moves. Rank (I, J) fetches the queries of its tile's rows and the keys and
values of its columns, and attends. What the C ranks of a grid row find for a token goes to the token's owner, who
merges it by the logarithms of the denominators. Each rank sends about (2 / R + 2 / C) M N c elements forward, c = h d,
and (3 / R + 4 / C) M N c backward.

Gathered rows and columns would shrink only as 1 / R and 1 / C. So the samples come in about R + C groups, the next one
travelling while one is worked on, and a rank holds no more than O(M N c / P); the backward pass fetches them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cpfold_train.kernels.partial_attention import partial_attention, partial_gradients
from cpfold_train.kernels.regions import region
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Interval, split
from cpfold_train.parallel.layouts import col_parts
from cpfold_train.parallel.redistribute import Route

OP = "token_attention"
TOKENS = 4
"""The dim of tokens in what travels: (several tensors, B, samples, h, tokens, ...)."""

Coming = tuple[Route, Tensor]


def token_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cp: ContextParallel) -> Tensor:
    """``softmax_j(q_i . k_j + bias_ij) v_j`` over all N tokens j, for each sample and head; the softmax is in fp32 at
    least.

    Args:
        q: (B*M, N/P, h, d) queries of this rank's share of the tokens, already scaled; the M samples of one element of
            the batch follow each other.
        k, v: (B*M, N/P, h, d) of the same tokens.
        bias: tile (B, h, N/R, N/C), the same for the M samples; very negative where a key is masked.
        cp: the running grid.

    Returns:
        (B*M, N/P, h, d) of this rank's share.
    """
    batch = bias.shape[0]
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(2, 3) for x in (q, k, v))
    return _TokenAttention.apply(q, k, v, bias, cp).transpose(2, 3).flatten(0, 1)


class _TokenAttention(torch.autograd.Function):
    """Of queries, keys and values (B, M, h, N/P, d)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp, n = cp, q.shape[3] * cp.grid.cp_size
        # Laid out for what follows in the model, which wants tokens before heads.
        out = torch.empty_like(q.transpose(2, 3), memory_format=torch.contiguous_format).transpose(2, 3)
        log_total = q.new_empty(q.shape[:-1], dtype=torch.promote_types(bias.dtype, torch.float32))

        def fetch(some: slice) -> list[Coming]:
            rows, cols = _rows(cp, n), _cols(cp, n)
            return [
                (rows, rows.send_forward(q[None, :, some])),
                (cols, cols.send_forward(torch.stack([k[:, some], v[:, some]]))),
            ]

        def merge(some: slice, going: Sequence[Coming]) -> None:
            parts, logs = (route.wait_forward(x) for route, x in going)
            out[:, some], log_total[:, some] = _merged(parts, logs)

        before: tuple[slice, list[Coming]] | None = None
        for some, (rows, (k_g, v_g)) in _in_turn(_groups(q, cp), fetch):
            found = partial_attention(rows[0], k_g, v_g, bias, cp.kernels)
            if before:
                merge(*before)
            routes = _merges(cp, n), _merges(cp, n)
            before = some, [(route, route.send_forward(x[None])) for route, x in zip(routes, found)]
            del rows, k_g, v_g, found
        merge(*before)
        ctx.save_for_backward(q, k, v, bias, out, log_total)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, out, log_total = ctx.saved_tensors
        cp, n, wide = ctx.cp, q.shape[3] * ctx.cp.grid.cp_size, log_total.dtype
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=wide)

        def fetch(some: slice) -> list[Coming]:
            g, of = grad[:, some], _rows(cp, n)
            rows, cols = _rows(cp, n), _cols(cp, n)
            shift = (g * out[:, some]).sum(-1, dtype=wide)
            return [
                (rows, rows.send_forward(torch.stack([q[:, some], g]))),
                (of, of.send_forward(torch.stack([log_total[:, some], shift]))),
                (cols, cols.send_forward(torch.stack([k[:, some], v[:, some]]))),
            ]

        def add_grads(some: slice, rows: Route, dq_g: Tensor, cols: Route, dkv_g: Tensor) -> None:
            dq[:, some] = rows.wait_grad(dq_g)[0]
            dk[:, some], dv[:, some] = cols.wait_grad(dkv_g)

        before: tuple[slice, Route, Tensor, Route, Tensor] | None = None
        for some, ((q_g, g), (log_total_g, shift), (k_g, v_g)) in _in_turn(_groups(q, cp), fetch):
            dq_g = torch.zeros_like(q_g, dtype=wide)
            dkv_g = partial_gradients(q_g, k_g, v_g, bias, g, log_total_g, shift, dq_g, dbias, cp.kernels)
            if before:
                add_grads(*before)
            before = some, _rows(cp, n), dq_g[None].to(q.dtype), _cols(cp, n), torch.stack(dkv_g).to(k.dtype)
            before[1].send_grad(before[2])
            before[3].send_grad(before[4])
            del q_g, g, k_g, v_g, dq_g, dkv_g
        add_grads(*before)
        return dq, dk, dv, dbias.to(bias.dtype), None


@region
def _merged(parts: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Results (C, ...) over the keys of several ranks, and the logarithms of their denominators, to those over all."""
    log_total = logs.logsumexp(0)
    weights = (logs - log_total).exp()[..., None].to(parts.dtype)
    return (parts * weights).sum(0), log_total


def _groups(q: Tensor, cp: ContextParallel) -> list[slice]:
    """The samples of ``q`` (B, M, ...) to fetch at a time."""
    most = 1 if cp.grid.cp_size == 1 else cp.grid.rows + cp.grid.cols
    return [slice(*group) for group in split(q.shape[1], min(q.shape[1], most))]


def _in_turn(groups: Sequence[slice], fetch: Callable[[slice], list[Coming]]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each group with what ``fetch`` brings, handed out when the next group's is on its way."""
    coming = fetch(groups[0])
    for i, group in enumerate(groups):
        arrived = [route.wait_forward(x) for route, x in coming]
        coming = fetch(groups[i + 1]) if i + 1 < len(groups) else []
        yield group, arrived
        # Else, as where whoever loops over it kept them, three groups would be held.
        arrived.clear()


def _rows(cp: ContextParallel, n: int) -> Route:
    """From shares to the tile's rows, which are the shares of the ranks of a grid row."""
    return Route(cp, cp.col, (TOKENS,), tuple((s,) for s in _row_shares(cp, n)), (_tile_rows(cp, n),) * cp.col.size, OP)


def _cols(cp: ContextParallel, n: int) -> Route:
    """From shares to the tile's columns."""
    shares = tuple((share,) for share in split(n, cp.all.size))
    return Route(cp, cp.all, (TOKENS,), shares, tuple((part,) for part in col_parts(cp.grid, n)), OP)


def _merges(cp: ContextParallel, n: int) -> Route:
    """From what one rank of a grid row found for the tile's rows to what all of them found for a share."""
    size = cp.col.size
    has = tuple(((j, j + 1), *_tile_rows(cp, n)) for j in range(size))
    wants = tuple(((0, size), share) for share in _row_shares(cp, n))
    return Route(cp, cp.col, (0, TOKENS), has, wants, OP)


def _tile_rows(cp: ContextParallel, n: int) -> tuple[Interval]:
    return (cp.grid.row_tokens(n),)


def _row_shares(cp: ContextParallel, n: int) -> tuple[Interval, ...]:
    first = cp.grid.row * cp.grid.cols
    return split(n, cp.all.size)[first : first + cp.grid.cols]
