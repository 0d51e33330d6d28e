"""Triangle multiplication: every pair (i, j) is updated from all pairs (i, k) and (j, k).

AlphaFold 3, Algorithms 12 (outgoing) and 13 (incoming). There are two ways to bring a and b, gated projections of z, to
where they are multiplied; T = B (N/R) (N/C) c is the size of a tile.

All-to-all: the contraction over k is independent for each channel. So the tiles are exchanged for channels: rank p gets
all N x N pairs of its c/P channels, does one batched matrix product, and the result goes back to tiles. Each rank sends
3 T (P - 1) / P elements forward and as many backward.

Ring: rank (I, J) adds up the products of one block of k after the other, with the tiles of a and b sent straight from
the ranks that have them. Each rank sends about (R + C - 2) T forward and twice that backward (Fold-CP's way, without
its square grids). It is for more ranks than channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cpfold_train.kernels.gated_output import gated_output
from cpfold_train.kernels.gated_projection import gated_projection_beside
from cpfold_train.ops.stream import stream
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.cost import channel_groups, choose, triangle_multiplication_cost
from cpfold_train.parallel.exchange_plan import ExchangePlan, Layout
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.layouts import col_parts, everything, row_parts, tiles, with_dim

OP = "triangle_multiplication"
Product = Callable[[Tensor, Tensor], Tensor]


class MultiplicationWeights(NamedTuple):
    """Parameters: (c,) of the norms, (2c, c) of ``p_in`` and ``g_in``, (c, c) of ``p_out`` and ``g_out``."""

    norm_in_weight: Tensor
    norm_in_bias: Tensor
    p_in: Tensor
    g_in: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor


def triangle_multiplication_outgoing(
    z: Tensor,
    pair_mask: Tensor,
    w: MultiplicationWeights,
    cp: ContextParallel,
    residual: bool = False,
    row_factors: Tensor | None = None,
) -> Tensor:
    """``gate_ij W norm(sum_k a_ik b_jk)``, with a and b gated projections of z.

    Args:
        z: tile (B, N/R, N/C, c).
        pair_mask: tile (B, N/R, N/C).
        w: parameters.
        cp: the running grid.
        residual: add z.
        row_factors: (B, N/R), with which the rows of the update are multiplied: a dropout of theirs.

    Returns:
        Update of the tile (B, N/R, N/C, c), or, with the residual, the new tile.
    """
    n = z.shape[1] * cp.grid.rows
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    blocks = [col_parts(cp.grid, n, k) for k in range(cp.grid.cols)]
    pieces = [(tuple(zip(rows, block)), tuple(zip(cols, block))) for block in blocks]
    x, z = _product(z, pair_mask, w, lambda a, b: a @ b.mT, pieces, False, cp)
    return _output(x, z, w, cp, residual, row_factors)


def triangle_multiplication_incoming(
    z: Tensor,
    pair_mask: Tensor,
    w: MultiplicationWeights,
    cp: ContextParallel,
    residual: bool = False,
    row_factors: Tensor | None = None,
) -> Tensor:
    """``gate_ij W norm(sum_k a_ki b_kj)``; otherwise as :func:`triangle_multiplication_outgoing`."""
    n = z.shape[1] * cp.grid.rows
    rows, cols = row_parts(cp.grid, n), col_parts(cp.grid, n)
    blocks = [row_parts(cp.grid, n, k) for k in range(cp.grid.rows)]
    pieces = [(tuple(zip(block, rows)), tuple(zip(block, cols))) for block in blocks]
    x, z = _product(z, pair_mask, w, lambda a, b: a.mT @ b, pieces, True, cp)
    return _output(x, z, w, cp, residual, row_factors)


def _product(
    z: Tensor,
    pair_mask: Tensor,
    w: MultiplicationWeights,
    product: Product,
    pieces: list[tuple[Layout, Layout]],
    incoming: bool,
    cp: ContextParallel,
) -> tuple[Tensor, Tensor]:
    """That of a and b, (B, c, N/R, N/C), and z for what follows; ``pieces`` are the tiles of a and b that each rank
    needs in each step of the ring."""
    n = z.shape[1] * cp.grid.rows
    norm = w.norm_in_weight, w.norm_in_bias
    a_and_b, z = gated_projection_beside(z, pair_mask, *norm, w.p_in, w.g_in, cp.kernels)
    if _algorithm(z, incoming, cp) == "ring":
        has = tiles(cp.grid, n, n)
        plans = [[ExchangePlan(cp, cp.all, (2, 3), has, wants, OP) for wants in step] for step in pieces]
        a, b = a_and_b.chunk(2, 1)
        return stream(lambda _, a, b: product(a, b), plans, (), (a, b)), z
    return _by_channels(a_and_b, product, n, incoming, cp), z


def _output(
    x: Tensor, z: Tensor, w: MultiplicationWeights, cp: ContextParallel, residual: bool, row_factors: Tensor | None
) -> Tensor:
    norms = w.norm_in_weight, w.norm_in_bias, w.norm_out_weight, w.norm_out_bias
    return gated_output(x, z, *norms, w.p_out, w.g_out, cp.kernels, residual, row_factors)


def _algorithm(z: Tensor, incoming: bool, cp: ContextParallel) -> str:
    size = z.numel() * z.element_size()
    grid = cp.grid.transposed() if incoming else cp.grid
    costs = (triangle_multiplication_cost(grid, z.shape[3], way, size) for way in ("ring", "alltoall"))
    return choose(cp.algorithm, *costs, size)


def _by_channels(a_and_b: Tensor, product: Product, n: int, incoming: bool, cp: ContextParallel) -> Tensor:
    """The product of all tiles, with all pairs of a few channels on each rank: a and b in one, (B, 2c, N/R, N/C), to
    (B, c, N/R, N/C).

    Channels go in groups: one travels while another is multiplied, there, back and in the backward pass. Where they do
    not divide, the first ranks get more of the outgoing edges and the last ranks more of the incoming ones.
    """
    if cp.all.size == 1:
        return product(*a_and_b.chunk(2, 1))
    channels = a_and_b.shape[1] // 2
    groups = []
    for first, last in split(channels, channel_groups(cp.grid, channels, a_and_b.nbytes / 2)):
        c = last - first
        as_tiles = with_dim(((0, c),) * cp.all.size, tiles(cp.grid, n, n))
        as_channels = with_dim(split(c, cp.all.size)[:: -1 if incoming else 1], everything(cp.grid, n, n))
        there = ExchangePlan(cp, cp.all, (1, 2, 3), as_tiles, as_channels, OP)
        back = ExchangePlan(cp, cp.all, (1, 2, 3), as_channels, as_tiles, OP)
        groups.append(_Group(slice(first, last), there, back))
    return _ByChannels.apply(a_and_b, groups, product, incoming)


class _Group(NamedTuple):
    """Some of the channels; how those of a and b come to the ranks that multiply them, and how the product returns."""

    channels: slice
    there: ExchangePlan
    back: ExchangePlan


class _ByChannels(torch.autograd.Function):
    """One function of all groups: each comes to its channels of one result, and of one gradient."""

    @staticmethod
    def forward(ctx, a_and_b: Tensor, groups: list[_Group], product: Product, incoming: bool) -> Tensor:
        ctx.groups, ctx.incoming = groups, incoming
        a, b = a_and_b.chunk(2, 1)
        coming = [[g.there.send_forward(x[:, g.channels]) for x in (a, b)] for g in groups]
        out, going, operands = None, [], []
        for g, flights in zip(groups, coming):
            operands += [flight.wait() for flight in flights]
            x = product(*operands[-2:])
            out = x.new_empty(a.shape) if out is None else out
            going.append(g.back.send_forward(x, out[:, g.channels]))
        for flight in going:
            flight.wait()
        ctx.save_for_backward(*operands)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        coming = [g.back.send_grad(grad[:, g.channels]) for g in ctx.groups]
        found = grad.new_empty(grad.shape[0], 2 * grad.shape[1], *grad.shape[2:], dtype=saved[0].dtype)
        going = []
        for g, flight, a, b in zip(ctx.groups, coming, saved[::2], saved[1::2]):
            dx = flight.wait()
            # Of x = a^T b: da = (dx b^T)^T, db = a dx. Of x = a b^T: da = dx b, db = (a^T dx)^T.
            da, db = ((dx @ b.mT).mT, a @ dx) if ctx.incoming else (dx @ b, (a.mT @ dx).mT)
            going += [g.there.send_grad(dy, whole[:, g.channels]) for dy, whole in zip((da, db), found.chunk(2, 1))]
        for flight in going:
            flight.wait()
        return found, None, None, None
