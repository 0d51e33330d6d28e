"""Triangle attention: every pair (i, j) attends to the pairs of its row or of its column.

AlphaFold 3, Algorithms 14 (starting node) and 15 (ending node). There are two ways to bring the pairs together;
T = B (N/R) (N/C) c is the size of a tile.

All-to-all: an exchange inside the row group (the column group) turns tiles into complete rows (columns), on which
attention is local; the result goes back the same way. Only the triangle bias, h channels of N x N, is needed by every
rank; it is gathered whole where that is at most half a tile, else in panels of so many heads. Each rank sends
2 T (C - 1) / C elements forward for the starting node, 2 T (R - 1) / R for the ending node, and (P - 1) T h / c of
bias; as many backward, and the bias once more where there are several panels. On large grids the bias outweighs z:
there q ranks hold the same rows, each attends for 1/q of the queries and gets 1/q of the bias.

Ring: queries stay where they are; keys, values and their bias come around the grid. Each rank sends 2 (C - 1) T and
about C T h / c of bias forward, and twice that backward.

With torch's kernels z travels, and each block of rows is normalised, projected and attended in. With fused ones a tile
is normalised once, for the bias too, and LN(z) travels: under autocast in its dtype, half the bytes of z in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cpfold_train.kernels.attention import gated_attention
from cpfold_train.kernels.by_rows import GPU_BLOCK_BYTES, by_rows, rows_per_block
from cpfold_train.kernels.fused import product_dtype
from cpfold_train.kernels.layer_norm import layer_norm_beside
from cpfold_train.kernels.linear import linear
from cpfold_train.ops.pair_bias import pair_bias, project_bias
from cpfold_train.ops.ring_attention import ring_attention
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.cost import bias_panels, choose, row_groups, row_sharers, triangle_attention_cost
from cpfold_train.parallel.grid import Interval, split
from cpfold_train.parallel.layouts import (
    col_parts,
    col_shares,
    mirrored_tiles,
    row_parts,
    row_shares,
    swapped,
    tiles,
    whole_cols,
    whole_rows,
    with_dim,
)
from cpfold_train.parallel.redistribute import Layout, Pending, Route, finish, finish_added, start

Parts = tuple[Interval, ...]
Norm = tuple[Tensor, ...]
"""Weight and bias (c,) of a norm, or nothing where it is done."""

FUSED_BLOCK_BYTES = 1 << 31
"""Queries, keys, values and gates of the rows that a fused kernel takes at a time on a GPU: each block turns the bias
and adds up its gradient once more, and rows that are not all in one block are attended in again in the backward pass.
All that a rank has at a time are within it up to 4,096 tokens on 2x2, in bf16."""


class Weights(NamedTuple):
    """Parameters: (c,) of the norm, (h, c) of ``bias``, (h d, c) of ``q``, ``k``, ``v``, ``g``, (c, h d) of ``o``."""

    norm_weight: Tensor
    norm_bias: Tensor
    bias: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor


class _Residual(NamedTuple):
    """A tile z (B, r, q, c) and, for a dropout, what the update's rows (B, r, 1, 1) are multiplied with first."""

    z: Tensor
    factors: Tensor | None


def triangle_attention_starting(
    z: Tensor,
    token_mask: Tensor,
    w: Weights,
    cp: ContextParallel,
    residual: bool = False,
    factors: Tensor | None = None,
) -> Tensor:
    """Pair (i, j) attends to the pairs (i, k), with the bias of (j, k).

    Args:
        z: tile (B, N/R, N/C, c).
        token_mask: (B, N), 1 for real tokens.
        w: parameters.
        cp: the running grid.
        residual: add z.
        factors: (B, N/R), with which the rows of the update are multiplied: a dropout of theirs. With the residual.

    Returns:
        Update of the tile (B, N/R, N/C, c), or, with the residual, the new tile.
    """
    n, op = z.shape[1] * cp.grid.rows, "triangle_attention_start"
    as_tiles = tiles(cp.grid, n, n)
    key_mask = token_mask[:, None, slice(*cp.grid.col_tokens(n))].expand(z.shape[:3])
    old, z, norm, bias = _normed(z, key_mask, w, cp)
    add = _Residual(old, _of_pairs(factors)) if residual else None
    bias = bias.contiguous()
    if _algorithm(z, n, w, False, cp) == "ring":
        blocks = [col_parts(cp.grid, n, k) for k in range(cp.grid.cols)]
        rows, queries = row_parts(cp.grid, n), col_parts(cp.grid, n)
        return _added(_around_the_grid(z, bias, norm, w, rows, queries, blocks, as_tiles, cp, op), add)
    groups = row_groups(cp.grid, n, z.shape[3], bias.shape[1])
    sharers = row_sharers(cp.grid, z.shape[3])
    some = n // groups
    as_rows, shares = whole_rows(cp.grid, some, n, sharers), col_shares(cp.grid, n, sharers)
    has = tiles(cp.grid, some, n)
    return _in_whole_rows(z.chunk(groups, 1), bias, norm, w, has, as_rows, shares, as_tiles, n, cp, op, add)


def triangle_attention_ending(
    z: Tensor,
    token_mask: Tensor,
    w: Weights,
    cp: ContextParallel,
    residual: bool = False,
    factors: Tensor | None = None,
) -> Tensor:
    """Pair (i, j) attends to the pairs (k, j), with the bias of (k, i); otherwise as
    :func:`triangle_attention_starting`, of which it is the transpose: ``factors`` (B, N/C) are those of columns."""
    n, op = z.shape[1] * cp.grid.rows, "triangle_attention_end"
    as_tiles = mirrored_tiles(cp.grid, n)
    key_mask = token_mask[:, slice(*cp.grid.row_tokens(n)), None].expand(z.shape[:3])
    old, z, norm, bias = _normed(z, key_mask, w, cp)
    add = _Residual(old.transpose(1, 2), _of_pairs(factors)) if residual else None
    z, bias = z.transpose(1, 2), bias.mT.contiguous()
    if _algorithm(z, n, w, True, cp) == "ring":
        blocks = [row_parts(cp.grid, n, k) for k in range(cp.grid.rows)]
        rows, queries = col_parts(cp.grid, n), row_parts(cp.grid, n)
        update = _around_the_grid(z, bias, norm, w, rows, queries, blocks, as_tiles, cp, op)
        return _added(update, add).transpose(1, 2)
    groups = row_groups(cp.grid, n, z.shape[3], bias.shape[1], ending=True)
    sharers = row_sharers(cp.grid, z.shape[3], ending=True)
    some = n // groups
    has, as_rows = (swapped(layout) for layout in (tiles(cp.grid, n, some), whole_cols(cp.grid, n, some, sharers)))
    shares = row_shares(cp.grid, n, sharers)
    new = _in_whole_rows(z.chunk(groups, 1), bias, norm, w, has, as_rows, shares, as_tiles, n, cp, op, add)
    return new.transpose(1, 2)


def _of_pairs(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors[:, :, None, None]


def _added(update: Tensor, add: _Residual | None) -> Tensor:
    if add is None:
        return update
    return add.z + (update if add.factors is None else update * add.factors.to(update.dtype))


def _algorithm(z: Tensor, n: int, w: Weights, ending: bool, cp: ContextParallel) -> str:
    sizes = n, z.shape[3], w.bias.shape[0], w.q.shape[0]
    costs = (triangle_attention_cost(cp.grid, *sizes, way, ending) for way in ("ring", "alltoall"))
    return choose(cp.algorithm, *costs, z.numel() * z.element_size())


def _normed(z: Tensor, key_mask: Tensor, w: Weights, cp: ContextParallel) -> tuple[Tensor, Tensor, Norm, Tensor]:
    """A tile z for its residual, what travels of it, the norm that this still wants, and the triangle bias (B, h, N/R,
    N/C).

    The bias is -1e9 where the key (B, N/R, N/C) is no real token.
    """
    norm = w.norm_weight, w.norm_bias
    if cp.kernels == "torch":
        return z, z, norm, pair_bias(z, key_mask, *norm, w.bias, 1e9)
    x, z = layer_norm_beside(z, *norm, cp.kernels, product_dtype(z))
    return z, x, (), project_bias(x, key_mask, w.bias, 1e9)


def _in_whole_rows(
    z: tuple[Tensor, ...],
    bias: Tensor,
    norm: Norm,
    w: Weights,
    has: Layout,
    as_rows: Layout,
    shares: Parts,
    bias_has: Layout,
    n: int,
    cp: ContextParallel,
    op: str,
    add: _Residual | None,
) -> Tensor:
    """Gated attention within complete rows: groups of a tile's rows (B, r, q, c) and its bias to the tile's update, or
    to the new tile.

    One group travels while another attends, there, back and in the backward pass. ``has`` and ``as_rows`` number the
    rows of a group. Ranks that have the same rows attend for their ``shares`` of the queries.
    """

    def fetched(some: Iterable[Tensor]) -> list[Pending]:
        return [start(part, cp, cp.all, (1, 2), has, as_rows, op) for part in some]

    heads = bias.shape[1]
    shared = (*_shared_weights(w, heads), *norm)
    mine = shares[cp.all.index]
    panels = bias_panels(cp.grid, z[0].shape[3], heads, n // (mine[1] - mine[0]))
    if panels == 1:
        wants = tuple((share, (0, n)) for share in shares)
        # What the first group waits for goes first.
        coming = fetched(z[:1])
        bias = start(bias, cp, cp.all, (2, 3), bias_has, wants, op)
        coming += fetched(z[1:])
        bias = finish(bias)
        updates = (_attend(finish(part), bias, shared, mine, cp.kernels) for part in coming)
    else:
        coming = fetched(z)
        every, groups = ((0, heads),) * cp.all.size, split(heads, panels)
        wants = tuple((share, (0, n)) for share in shares)
        routes = [
            [Route(cp, cp.all, (1, 2, 3), with_dim(every, bias_has), with_dim((group,) * cp.all.size, wants), op)]
            for group in groups
        ]

        def step(k: int, z: Tensor, *args: Tensor) -> Tensor:
            *shared, bias = args
            return _attend_rows(mine, cp.kernels, z, bias, *_of_heads(shared, groups[k], heads))

        rows = _rows_at_once(z[0], n, shared, cp.kernels)
        updates = (stream(step, routes, shared, (bias,), inputs=(finish(part),), rows=rows) for part in coming)
    done = tuple((rows, share) for (rows, _), share in zip(as_rows, shares))
    going = [start(update, cp, cp.all, (1, 2), done, has, op) for update in updates]
    if add is not None and cp.kernels != "torch":
        return finish_added(going, *add)
    return _added(finish(going[0]) if len(going) == 1 else torch.cat([finish(part) for part in going], 1), add)


def _around_the_grid(
    z: Tensor,
    bias: Tensor,
    norm: Norm,
    w: Weights,
    rows: Parts,
    queries: Parts,
    blocks: list[Parts],
    as_tiles: Layout,
    cp: ContextParallel,
    op: str,
) -> Tensor:
    """Gated attention of a tile's pairs (B, r, q, c), whose keys are fetched ``blocks[k]`` after ``blocks[k]``."""
    heads = bias.shape[1]
    qg, kv, o = _shared_weights(w, heads)
    x = _norm(z, *norm)
    q, g = linear(x, qg).unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind()
    kv = linear(x, kv).unflatten(-1, (2, heads, -1)).permute(0, 1, 4, 2, 3, 5)
    steps = [
        (
            Route(cp, cp.all, (1, 3), as_tiles, tuple(zip(rows, block)), op),
            Route(cp, cp.all, (2, 3), as_tiles, tuple(zip(queries, block)), op),
        )
        for block in blocks
    ]
    q = q.contiguous() if cp.kernels == "torch" else q
    attended = ring_attention(q, kv, bias, steps, cp.kernels) * g.sigmoid()
    return linear(attended.transpose(2, 3).flatten(3), o)


def _shared_weights(w: Weights, heads: int) -> tuple[Tensor, ...]:
    """Projections that concern queries (scaled) and keys, and output."""
    scale = (w.q.shape[0] // heads) ** -0.5
    return torch.cat([w.q * scale, w.g]), torch.cat([w.k, w.v]), w.o


def _of_heads(shared: Sequence[Tensor], some: Interval, heads: int) -> tuple[Tensor, ...]:
    """The part of :func:`_shared_weights` that concerns some of the heads, and what follows them."""
    qg, kv, o, *norm = shared
    qg, kv = (x.unflatten(0, (2, heads, -1))[:, slice(*some)].flatten(0, 2) for x in (qg, kv))
    return qg, kv, o.unflatten(1, (heads, -1))[:, slice(*some)].flatten(1), *norm


def _attend(z: Tensor, bias: Tensor, shared: Sequence[Tensor], queries: Interval, kernels: str) -> Tensor:
    """Complete rows z (B, r, N, c) and the bias (B, h, M, N) of some queries to the update of these (B, r, M, c).

    Fused kernels hold no scores. So where all rows make one block, what autograd keeps for the backward pass are their
    queries, keys, values, gates and results, five times z, and nothing is computed once more.
    """
    rows = _rows_at_once(z, z.shape[2], shared, kernels)
    if kernels != "torch" and rows >= z.shape[1]:
        return _attend_rows(queries, kernels, z, bias, *shared)
    return by_rows(partial(_attend_rows, queries, kernels), rows, (z,), (bias, *shared))


def _rows_at_once(z: Tensor, n: int, shared: Sequence[Tensor], kernels: str) -> int:
    """How many complete rows of n pairs, of z (B, ..., c), to attend in at a time."""
    qkvg_bytes = z.shape[0] * n * sum(w.shape[0] for w in shared[:2]) * z.element_size()
    # The gradient of the bias is added up once per block: a block of one row would make that dear.
    gpu_bytes = GPU_BLOCK_BYTES if kernels == "torch" else FUSED_BLOCK_BYTES
    return max(4, rows_per_block(qkvg_bytes, z.device, gpu_bytes=gpu_bytes))


def _attend_rows(
    queries: Interval, kernels: str, z: Tensor, bias: Tensor, qg: Tensor, kv: Tensor, o: Tensor, *norm: Tensor
) -> Tensor:
    """What :func:`_attend` returns, for a block of rows and the heads that the bias and the weights have."""
    x, heads = _norm(z, *norm), bias.shape[1]
    if kernels != "torch" and bias.shape[2] == bias.shape[3]:
        # One product, forward and backward, for queries and keys of the same pairs.
        qgkv = linear(x, torch.cat([qg, kv])).unflatten(-1, (4, heads, -1))
        return linear(gated_attention(qgkv, None, bias, kernels).flatten(3), o)
    qg = linear(x[:, :, slice(*queries)], qg).unflatten(-1, (2, heads, -1))
    kv = linear(x, kv).unflatten(-1, (2, heads, -1))
    return linear(gated_attention(qg, kv, bias, kernels).flatten(3), o)


def _norm(z: Tensor, *norm: Tensor) -> Tensor:
    return F.layer_norm(z, norm[0].shape, *norm) if norm else z
