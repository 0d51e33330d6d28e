"""Attention of sharded tokens on grids against the formula on whole tensors: forward, every gradient, bytes sent."""

from __future__ import annotations

import multiprocessing as mp

import pytest
import torch
from torch import Tensor

from cpfold_train.kernels import blockwise_attention as blocks
from cpfold_train.ops.token_attention import OP, token_attention
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.ledger import LedgerEntry
from cpfold_train.simulate.bench.simulate import LiveMemory

B, M, HEADS, WIDTH, LENGTHS = 2, 5, 3, 4, (13, 9)
GRIDS = [(1, 1), (1, 2), (3, 1), (2, 3), pytest.param((3, 3), marks=pytest.mark.slow)]


def inputs(n: int) -> list[Tensor]:
    """Queries, keys and values (B*M, n, h, d), a bias (B, h, n, n), and weights of the real tokens' results."""
    generator = torch.Generator().manual_seed(0)
    whole = [(B * M, max(LENGTHS), HEADS, WIDTH)] * 3 + [(B, HEADS, max(LENGTHS), max(LENGTHS))]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for shape in [*whole, whole[0]]]
    padded = [x.new_zeros([n if size == max(LENGTHS) else size for size in x.shape]) for x in tensors]
    for x, into in zip(tensors, padded):
        into[tuple(map(slice, x.shape))] = x
    for i, length in enumerate(LENGTHS):
        padded[3][i, :, :, length:] = -1e6
        padded[4][i * M : (i + 1) * M, length:] = 0
    return padded


def attend(cp) -> tuple[list[Tensor], int]:
    """Result and gradients on this rank, and the bytes it sent forward."""
    n = cp.grid.pad_tokens(max(LENGTHS))
    own = slice(n // cp.grid.cp_size * cp.grid.cp_index, n // cp.grid.cp_size * (cp.grid.cp_index + 1))
    *qkv, bias, weight = inputs(n)
    local = [x[:, own].requires_grad_() for x in qkv]
    local.append(bias[:, :, slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))].requires_grad_())
    original, blocks.rows_per_block = blocks.rows_per_block, lambda *_: 2
    try:
        out = token_attention(*local, cp)
        sent = cp.ledger.by_op().get(OP, LedgerEntry()).sent_bytes
        return [out.detach(), *torch.autograd.grad((out * weight[:, own]).sum(), local)], sent
    finally:
        blocks.rows_per_block = original


def formula(n: int) -> list[Tensor]:
    *tensors, weight = inputs(n)
    q, k, v, bias = (x.requires_grad_() for x in tensors)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + bias.repeat_interleave(M, 0)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v, bias))]


@pytest.mark.parametrize("shape", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_grids(ranks, shape):
    grid = Grid(*shape)
    n = grid.pad_tokens(max(LENGTHS))
    parts = [found for found, _ in ranks.run(attend, *shape)]
    joined = [torch.cat([part[i] for part in parts], 1) for i in range(4)]
    rows = [torch.cat([p[4] for p in parts[r * grid.cols : (r + 1) * grid.cols]], 3) for r in range(grid.rows)]
    for name, actual, expected in zip(["out", "dq", "dk", "dv", "dbias"], [*joined, torch.cat(rows, 2)], formula(n)):
        torch.testing.assert_close(
            actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_bytes(ranks, shape):
    """Queries go to the others of a grid row, and what they found comes back; keys and values go to a grid column."""
    grid = Grid(*shape)
    n = grid.pad_tokens(max(LENGTHS))
    share = B * M * (n // grid.cp_size) * HEADS * 8
    queries = share * (grid.cols - 1) * (2 * WIDTH + 1)
    # Each token's are wanted by R ranks, of which its owner may be one.
    every = [Grid(*shape, 1, rank) for rank in range(grid.cp_size)]
    kept = sum(len(set(range(*one.col_tokens(n))) & set(range(*one.atoms(n)))) for one in every)
    keys = 2 * B * M * HEADS * WIDTH * 8 * (grid.rows * n - kept)
    assert sum(sent for _, sent in ranks.run(attend, *shape)) == grid.cp_size * queries + keys


def peak_bytes(grid: Grid) -> int:
    """Most that the op holds above its inputs, forward and backward, on a rank of a simulated world."""
    n, samples, heads, width = 512, 16, 4, 32
    with fake_world(grid) as cp, LiveMemory() as memory:
        share = (samples, n // grid.cp_size, heads, width)
        q, k, v = (torch.randn(share, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, heads, n // grid.rows, n // grid.cols, requires_grad=True)
        memory.reset()
        before = memory.now
        token_attention(q, k, v, bias, cp).sum().backward()
    return memory.peak - before


def test_memory_falls_with_the_number_of_ranks():
    """Rows and columns of all samples at once would fall only with the sides of the grid."""
    # A simulated world wants a process of its own.
    with mp.get_context("fork").Pool(1) as pool:
        alone, four, sixteen = pool.map(peak_bytes, [Grid(1, 1), Grid(2, 2), Grid(4, 4)])
    assert four < 1.5 * alone / 4 and sixteen < 1.5 * alone / 16
