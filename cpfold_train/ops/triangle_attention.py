"""Triangle attention: every pair (i, j) attends to the pairs of its row or of its column.

AlphaFold 3, Algorithms 14 (starting node) and 15 (ending node). The ending node is the starting node of the transposed
pair representation, so both are one function of a tile and a grid: that of the transpose is
:meth:`~cpfold_train.parallel.grid.Grid.transposed`. There are two ways to bring the pairs of a row together;
T = B (N/R) (N/C) c is the size of a tile.

All-to-all: an exchange inside the row group turns tiles into complete rows, on which attention is local; the result
goes back the same way. Only the triangle bias, h channels of N x N, is needed by every rank; it is gathered whole where
that is at most half a tile, else in chunks of so many heads. Each rank sends 2 T (C - 1) / C elements forward and
(P - 1) T h / c of bias; as many backward, and the bias once more where there are several chunks. On large grids the
bias outweighs z: there every row has replicas on q ranks, each of which attends for 1/q of the queries and gets 1/q of
the bias.

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
from cpfold_train.parallel.cost import choose, head_chunks, row_groups, row_replicas, triangle_attention_cost
from cpfold_train.parallel.exchange_plan import ExchangePlan
from cpfold_train.parallel.grid import Grid, Interval, split
from cpfold_train.parallel.layouts import col_parts, query_parts, row_parts, tiles, whole_rows, with_dim
from cpfold_train.parallel.redistribute import Pending, finish, finish_added, start

Norm = tuple[Tensor, ...]
"""Weight and bias (c,) of a norm, or nothing where it is done."""

FUSED_BLOCK_BYTES = 1 << 31
"""Queries, keys, values and gates of the rows that a fused kernel takes at a time on a GPU: each block turns the bias
and adds up its gradient once more, and rows that are not all in one block are attended in again in the backward pass.
All that a rank has at a time are within it up to 4,096 tokens on 2x2, in bf16."""


class AttentionWeights(NamedTuple):
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


class _Tile(NamedTuple):
    """What a rank has of the pairs (i, j), of which those with the same i attend to each other.

    Attributes:
        x: (B, r, q, c) z, or LN(z).
        norm: that x still needs.
        bias: (B, h, r, q) of query i and key j, contiguous; -1e9 where the key is no real token.
        residual: what the update is added to, or None.
        grid: whose tile (r, q) it is.
    """

    x: Tensor
    norm: Norm
    bias: Tensor
    residual: _Residual | None
    grid: Grid

    def transposed(self) -> _Tile:
        """The same of the pairs (j, i)."""
        residual = self.residual and self.residual._replace(z=self.residual.z.transpose(1, 2))
        return _Tile(self.x.transpose(1, 2), self.norm, self.bias.mT.contiguous(), residual, self.grid.transposed())


def triangle_attention_starting(
    z: Tensor,
    token_mask: Tensor,
    w: AttentionWeights,
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
    cols = slice(*cp.grid.col_tokens(token_mask.shape[1]))
    tile = _tile(z, token_mask[:, None, cols], w, cp, residual, factors)
    return _triangle_attention(tile, w, cp, "triangle_attention_start")


def triangle_attention_ending(
    z: Tensor,
    token_mask: Tensor,
    w: AttentionWeights,
    cp: ContextParallel,
    residual: bool = False,
    factors: Tensor | None = None,
) -> Tensor:
    """Pair (i, j) attends to the pairs (k, j), with the bias of (k, i); otherwise as
    :func:`triangle_attention_starting`, of which it is the transpose: ``factors`` (B, N/C) are those of columns."""
    rows = slice(*cp.grid.row_tokens(token_mask.shape[1]))
    tile = _tile(z, token_mask[:, rows, None], w, cp, residual, factors).transposed()
    return _triangle_attention(tile, w, cp, "triangle_attention_end").transpose(1, 2)


def _tile(
    z: Tensor, key_mask: Tensor, w: AttentionWeights, cp: ContextParallel, residual: bool, factors: Tensor | None
) -> _Tile:
    """Of z as it lies, with its residual; ``key_mask`` (B, 1 or N/R, N/C or 1) says which keys are real tokens."""
    factors = None if factors is None else factors[:, :, None, None]
    norm, key_mask = (w.norm_weight, w.norm_bias), key_mask.expand(z.shape[:3])
    if cp.kernels == "torch":
        x, bias = z, pair_bias(z, key_mask, *norm, w.bias, 1e9)
    else:
        x, z = layer_norm_beside(z, *norm, cp.kernels, product_dtype(z))
        bias, norm = project_bias(x, key_mask, w.bias, 1e9), ()
    return _Tile(x, norm, bias.contiguous(), _Residual(z, factors) if residual else None, cp.grid)


def _triangle_attention(tile: _Tile, w: AttentionWeights, cp: ContextParallel, op: str) -> Tensor:
    """Gated attention within rows by the cheaper of the two ways: (B, r, q, c), the update of a tile or the new one."""
    x, grid = tile.x, tile.grid
    sizes = x.shape[1] * grid.rows, x.shape[3], w.bias.shape[0], w.q.shape[0]
    costs = (triangle_attention_cost(grid, *sizes, way) for way in ("ring", "alltoall"))
    if choose(cp.algorithm, *costs, x.numel() * x.element_size()) == "ring":
        return _around_the_grid(tile, w, cp, op)
    return _in_whole_rows(tile, w, cp, op)


def _added(update: Tensor, residual: _Residual | None) -> Tensor:
    if residual is None:
        return update
    return residual.z + (update if residual.factors is None else update * residual.factors.to(update.dtype))


def _in_whole_rows(tile: _Tile, w: AttentionWeights, cp: ContextParallel, op: str) -> Tensor:
    """All-to-all. Rows go in groups: one travels while another attends, there, back and in the backward pass."""
    grid, heads, c = tile.grid, w.bias.shape[0], tile.x.shape[3]
    n = tile.x.shape[1] * grid.rows
    groups, replicas = row_groups(grid, n, c, heads), row_replicas(grid, c)
    some, queries = n // groups, query_parts(grid, n, replicas)
    own_queries = queries[cp.all.index]
    # These number the rows of a group. A replica gives back its part of the queries.
    as_tiles, as_rows = tiles(grid, some, n), whole_rows(grid, some, n, replicas)
    attended = tuple((rows, part) for (rows, _), part in zip(as_rows, queries))
    bias_has, bias_wants = tiles(grid, n, n), tuple((part, (0, n)) for part in queries)
    shared = (*_shared_weights(w, heads), *tile.norm)

    def into_rows(parts: Iterable[Tensor]) -> list[Pending]:
        return [start(part, cp, cp.all, (1, 2), as_tiles, as_rows, op) for part in parts]

    parts = tile.x.chunk(groups, 1)
    chunks = head_chunks(grid, c, heads)
    if chunks == 1:
        # What the first group waits for goes first.
        coming = into_rows(parts[:1])
        bias = start(tile.bias, cp, cp.all, (2, 3), bias_has, bias_wants, op)
        coming += into_rows(parts[1:])
        bias = finish(bias)
        updates = (_attend(finish(part), bias, shared, own_queries, cp.kernels) for part in coming)
    else:
        coming = into_rows(parts)
        all_heads, chunked = ((0, heads),) * cp.all.size, split(heads, chunks)
        bias_has = with_dim(all_heads, bias_has)
        plans = [
            [ExchangePlan(cp, cp.all, (1, 2, 3), bias_has, with_dim((chunk,) * cp.all.size, bias_wants), op)]
            for chunk in chunked
        ]

        def step(k: int, z: Tensor, *args: Tensor) -> Tensor:
            *shared, bias = args
            return _attend_rows(own_queries, cp.kernels, z, bias, *_of_heads(shared, chunked[k], heads))

        rows = _rows_at_once(parts[0], n, shared, cp.kernels)
        updates = (stream(step, plans, shared, (tile.bias,), inputs=(finish(part),), rows=rows) for part in coming)
    going = [start(update, cp, cp.all, (1, 2), attended, as_tiles, op) for update in updates]
    if tile.residual is not None and cp.kernels != "torch":
        return finish_added(going, *tile.residual)
    update = finish(going[0]) if len(going) == 1 else torch.cat([finish(part) for part in going], 1)
    return _added(update, tile.residual)


def _around_the_grid(tile: _Tile, w: AttentionWeights, cp: ContextParallel, op: str) -> Tensor:
    """Ring: in each step come the keys and values of one more tile of the row, and the bias to them."""
    grid, heads = tile.grid, w.bias.shape[0]
    n = tile.x.shape[1] * grid.rows
    qg, kv, o = _shared_weights(w, heads)
    x = _norm(tile.x, *tile.norm)
    q, g = linear(x, qg).unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind()
    kv = linear(x, kv).unflatten(-1, (2, heads, -1)).permute(0, 1, 4, 2, 3, 5)
    as_tiles, rows, queries = tiles(grid, n, n), row_parts(grid, n), col_parts(grid, n)
    steps = [
        (
            ExchangePlan(cp, cp.all, (1, 3), as_tiles, tuple(zip(rows, keys)), op),
            ExchangePlan(cp, cp.all, (2, 3), as_tiles, tuple(zip(queries, keys)), op),
        )
        for keys in (col_parts(grid, n, step) for step in range(grid.cols))
    ]
    q = q.contiguous() if cp.kernels == "torch" else q
    attended = ring_attention(q, kv, tile.bias, steps, cp.kernels) * g.sigmoid()
    return _added(linear(attended.transpose(2, 3).flatten(3), o), tile.residual)


def _shared_weights(w: AttentionWeights, heads: int) -> tuple[Tensor, ...]:
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
    # The gradient of the bias is added up once per block: blocks of one row would make that expensive.
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
