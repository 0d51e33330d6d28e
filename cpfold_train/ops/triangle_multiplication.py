"""Triangle multiplication: every pair (i, j) is updated from all pairs (i, k) and (j, k).

AlphaFold 3, Algorithms 12 (outgoing) and 13 (incoming). There are two ways to bring a and b, gated projections of z, to
where they are multiplied; T = B (N/R) (N/C) c is the size of a tile.

All-to-all: the contraction over k is independent for each channel. So the tiles are exchanged for channels: rank p gets
all N x N pairs of its c/P channels, does one batched matrix product, and the result goes back to tiles. Each rank sends
3 T (P - 1) / P elements forward and as many backward.

Ring: rank (I, J) adds up the products of one block of k after the other, fetching the tiles of a and of b straight from
the ranks that have them. Each rank sends about (R + C - 2) T forward and twice that backward (Fold-CP's way, without
its square grids). It is for more ranks than channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.ops.linear import linear
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.cost import channel_groups, choose, triangle_multiplication_cost
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import col_parts, everything, row_parts, tiles, with_dim
from cpfold_train.parallel.redistribute import Layout, Route, finish, start

OP = "triangle_multiplication"
Product = Callable[[Tensor, Tensor], Tensor]


class Weights(NamedTuple):
    """Parameters: (c,) of the norms, (2c, c) of ``p_in`` and ``g_in``, (c, c) of ``p_out`` and ``g_out``."""

    norm_in_weight: Tensor
    norm_in_bias: Tensor
    p_in: Tensor
    g_in: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor


def triangle_multiplication_outgoing(z: Tensor, pair_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """``gate_ij W norm(sum_k a_ik b_jk)``, with a and b gated projections of z.

    Args:
        z: tile (B, N/R, N/C, c).
        pair_mask: tile (B, N/R, N/C).
        w: parameters.
        cp: the running grid.

    Returns:
        Update of the tile (B, N/R, N/C, c).
    """
    n = z.shape[1] * cp.grid.rows
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    blocks = [col_parts(cp.grid, n, k) for k in range(cp.grid.cols)]
    pieces = [(tuple(zip(rows, block)), tuple(zip(cols, block))) for block in blocks]
    return _update(z, pair_mask, w, lambda a, b: a @ b.mT, pieces, False, cp)


def triangle_multiplication_incoming(z: Tensor, pair_mask: Tensor, w: Weights, cp: ContextParallel) -> Tensor:
    """``gate_ij W norm(sum_k a_ki b_kj)``; otherwise as :func:`triangle_multiplication_outgoing`."""
    n = z.shape[1] * cp.grid.rows
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    blocks = [row_parts(cp.grid, n, k) for k in range(cp.grid.rows)]
    pieces = [(tuple(zip(block, rows)), tuple(zip(block, cols))) for block in blocks]
    return _update(z, pair_mask, w, lambda a, b: a.mT @ b, pieces, True, cp)


def _update(
    z: Tensor,
    pair_mask: Tensor,
    w: Weights,
    product: Product,
    pieces: list[tuple[Layout, Layout]],
    incoming: bool,
    cp: ContextParallel,
) -> Tensor:
    """The update of a tile; ``pieces`` are the tiles of a and of b that each rank needs in each step of the ring."""
    n, c = z.shape[1] * cp.grid.rows, z.shape[3]
    rows = rows_per_block(z.shape[0] * z.shape[2] * 4 * c * z.element_size(), z.device)
    a_and_b = by_rows(_project, rows, (z, pair_mask), (w.norm_in_weight, w.norm_in_bias, w.p_in, w.g_in), dim=2)
    a, b = a_and_b.chunk(2, 1)
    if _algorithm(z, incoming, cp) == "ring":
        has = tiles(cp.grid, n, n)
        routes = [[Route(cp, cp.all, (2, 3), has, wants, OP) for wants in step] for step in pieces]
        x = stream(lambda _, a, b: product(a, b), routes, (), (a, b))
    else:
        x = _by_channels(a, b, product, n, incoming, cp)
    shared = w.norm_in_weight, w.norm_in_bias, w.norm_out_weight, w.norm_out_bias, w.p_out, w.g_out
    return by_rows(_gated_output, rows, (x.permute(0, 2, 3, 1), z), shared)


def _algorithm(z: Tensor, incoming: bool, cp: ContextParallel) -> str:
    costs = (triangle_multiplication_cost(cp.grid, z.shape[3], way, incoming) for way in ("ring", "alltoall"))
    return choose(cp.algorithm, *costs, z.numel() * z.element_size())


def _by_channels(a: Tensor, b: Tensor, product: Product, n: int, incoming: bool, cp: ContextParallel) -> Tensor:
    """The product of all tiles, with all pairs of a few channels on each rank: (B, c, N/R, N/C) to the same.

    Channels go in groups: one travels while another is multiplied, there, back and in the backward pass. Where they do
    not divide, the first ranks get more of the outgoing edges and the last ranks more of the incoming ones.
    """
    groups = channel_groups(cp.grid, a.shape[1])
    moves = []
    for a_g, b_g in zip(a.chunk(groups, 1), b.chunk(groups, 1)):
        c = a_g.shape[1]
        as_tiles = with_dim(((0, c),) * cp.all.size, tiles(cp.grid, n, n))
        shares = split(c, cp.all.size)[:: -1 if incoming else 1]
        as_channels = with_dim(shares, everything(cp.grid, n, n))
        there = (start(x, cp, cp.all, (1, 2, 3), as_tiles, as_channels, OP) for x in (a_g, b_g))
        moves.append((*there, as_channels, as_tiles))
    going = [
        start(product(finish(a_g), finish(b_g)), cp, cp.all, (1, 2, 3), as_channels, as_tiles, OP)
        for a_g, b_g, as_channels, as_tiles in moves
    ]
    return finish(going[0]) if groups == 1 else torch.cat([finish(x) for x in going], 1)


def _project(z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, p_in: Tensor, g_in: Tensor) -> Tensor:
    """Rows (B, r, N/C, c) to a and b in one, channels first (B, 2c, r, N/C)."""
    x = layer_norm(z, norm_weight.shape, norm_weight, norm_bias)
    p, g = (torch.cat([p_in, g_in]) @ x.flatten(1, 2).mT).unflatten(2, z.shape[1:3]).chunk(2, 1)
    return p * g.sigmoid() * mask[:, None].to(p.dtype)


def _gated_output(
    x: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    p_out: Tensor,
    g_out: Tensor,
) -> Tensor:
    """Rows of the product and of z, (B, r, N/C, c), to rows of the update."""
    x = layer_norm(x.contiguous(), norm_out_weight.shape, norm_out_weight, norm_out_bias)
    z = layer_norm(z, norm_in_weight.shape, norm_in_weight, norm_in_bias)
    return linear(x, p_out) * linear(z, g_out).sigmoid()
