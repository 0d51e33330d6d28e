"""Every op and block gives the same on any grid as on 1x1, forward and backward, in fp64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from unittest import mock

import pytest
import torch

from cpfold_train.kernels import attention as attention_kernels
from cpfold_train.losses.distogram import distogram_loss
from cpfold_train.model.config import MemoryConfig, PairformerConfig
from cpfold_train.model.pair_stack import PairStack, TriangleAttentionEndingNode, TriangleAttentionStartingNode
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.ops import offload, triangle_attention
from cpfold_train.ops import outer_product_mean as opm
from cpfold_train.ops import pair_weighted_averaging as pwa
from cpfold_train.ops.recompute import recompute
from cpfold_train.parallel.context import TILED, ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing import trunk_cases
from cpfold_train.testing.parity import placed
from cpfold_train.testing.trunk_cases import C_S, C_Z, INPUTS, TRUNK, N, attention, double, draws, features, small_trunk
from tests.parity import GRIDS, check, check_against, cut, pad, randomise, run


def averaging(module, x, cp):
    # Three heads at a time, which do not divide the eight. Ranks that differ in this would not understand each other.
    original, pwa.rows_per_block = pwa.rows_per_block, lambda *_: 3
    try:
        return trunk_cases.averaging(module, x, cp)
    finally:
        pwa.rows_per_block = original


def outer_product(module, x, cp):
    # Of seven sequences two or three travel at a time.
    original, opm.GATHERED_BYTES = opm.GATHERED_BYTES, 1 << 15
    try:
        return trunk_cases.outer_product(module, x, cp)
    finally:
        opm.GATHERED_BYTES = original


IN_PARTS = {"pair weighted averaging": averaging, "outer product mean": outer_product}
CASES = TRUNK | {name: replace(TRUNK[name], call=call) for name, call in IN_PARTS.items()}


@pytest.fixture(scope="module")
def alone(ranks):
    """What a case gives on 1x1."""
    return cache(lambda case: ranks.run(run, 1, 1, CASES[case])[0])


# All cases of one grid after another: its ranks meet once.
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_grid_parity(ranks, alone, case, grid):
    check_against(alone(case), ranks, *grid, CASES[case])


def grouped_attention(module, x, cp):
    """Three groups of rows; on 2x3 two heads around the ending node make two chunks of bias for each of them."""
    original, triangle_attention.row_groups = triangle_attention.row_groups, lambda *_, **__: 3
    try:
        return attention(module, x, cp, "alltoall")
    finally:
        triangle_attention.row_groups = original


@pytest.mark.parametrize("cls", [TriangleAttentionStartingNode, TriangleAttentionEndingNode])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_in_groups_of_rows(ranks, cls, heads):
    inputs, placements = placed(INPUTS, ("z", "token_mask"))
    build = partial(double, cls, C_Z, 6, heads)
    check(ranks, 2, 3, build, grouped_attention, inputs, placements, "pair")


def train_step(cp: ContextParallel, memory: MemoryConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """Partial losses, gradients and placements of a small trunk: dropout on, one recycling, blocks recomputed."""
    trunk = small_trunk(memory)
    randomise(trunk)
    feats = features(cp.grid)
    out = trunk(feats, cp, recycling_steps=1, draws=draws())
    loss = distogram_loss(out["pdistogram"], feats, cp)
    loss.sum().backward()
    grads = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {name: (x.placements, x.shape) for name, x in out.items()}


@pytest.fixture(scope="module")
def found_with(ranks):
    """What a function gives on each rank of a grid, given what is kept: several tests compare with the same."""
    return cache(lambda function, rows, cols, **memory: ranks.run(function, rows, cols, MemoryConfig(**memory)))


@pytest.mark.parametrize(
    "grid",
    [(1, 2), (2, 3), (3, 1), *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((3, 3), (5, 1)))],
    ids=lambda g: f"{g[0]}x{g[1]}",
)
def test_training_step_of_the_trunk(found_with, grid):
    ((loss, grads, _),) = found_with(train_step, 1, 1)
    parts = found_with(train_step, *grid)
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-10, atol=0)
    assert len(grads) > 50
    for name, grad in grads.items():
        total = sum(part[1][name] for part in parts)
        torch.testing.assert_close(total, grad, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    n = Grid(*grid).pad_tokens(N)
    for placements, shape in (parts[0][2][name] for name in ("z", "pdistogram")):
        assert placements == TILED and shape[1:3] == (n, n)


LEVERS = (
    MemoryConfig(recompute=False),
    MemoryConfig(recompute_updates=True, blocks_at_once=2),
    MemoryConfig(recompute_updates=True, offload=True),
)


@pytest.mark.parametrize("memory", LEVERS, ids=["all kept", "updates", "updates, on the host"])
def test_what_the_trunk_keeps_changes_no_gradient(ranks, found_with, memory):
    for (loss, grads, _), (expected, others, _) in zip(
        ranks.run(train_step, 1, 2, memory), found_with(train_step, 1, 2)
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads, others, rtol=1e-9, atol=1e-12)


def test_recomputed_updates_keep_z_before_each_of_them(ranks):
    """Four updates and the transition; else there are many more."""
    assert ranks.run(tiles_kept, 1, 2, True) == [5, 5]
    assert min(ranks.run(tiles_kept, 1, 2, False)) > 9


def tiles_kept(cp: ContextParallel, recompute_updates: bool) -> int:
    """Tensors of a tile's size that a pair stack keeps."""
    stack = PairStack(C_Z, 6, 2, recompute_updates).double()
    z, mask = (cut(pad(x, kind, cp.grid), kind, cp.grid) for x, kind in (INPUTS["z"], INPUTS["token_mask"]))
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add((x.data_ptr(), x.numel())) or x, lambda x: x):
        updated = stack.update_pairs(z.clone().requires_grad_(), mask, cp, None)
    assert updated.shape == z.shape
    return sum(size == z.numel() for _, size in kept)


def blocks_with(cp: ContextParallel, memory: MemoryConfig) -> tuple[list[torch.Tensor], int]:
    """Result and gradients of five blocks, and how many tensors as large as the tile were kept for them."""
    module = PairformerModule(C_S, C_Z, PairformerConfig(5, 4, 0.25, 6, 2), memory).double()
    randomise(module)
    grid = cp.grid
    given = [INPUTS[name] for name in ("s", "z", "token_mask")]
    s, z, mask = (cut(pad(x, kind, grid), kind, grid) for x, kind in given)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        s, z = module(s, z.clone().requires_grad_(), mask, cp, draws())
    (s.sum() / grid.cp_size + z.square().sum()).backward()
    return [s.detach(), z.detach(), *(p.grad for p in module.parameters())], sum(shape == z.shape for shape in kept)


@pytest.mark.parametrize(
    ("memory", "tiles"),
    [
        (MemoryConfig(), 5),
        (MemoryConfig(blocks_at_once=2), 3),
        (MemoryConfig(recompute_updates=True), 5),
        (MemoryConfig(offload=True), 0),
        (MemoryConfig(blocks_at_once=2, offload=True), 0),
    ],
    ids=["recomputed", "two at once", "updates", "on the host", "two at once on the host"],
)
def test_what_is_kept_between_blocks_changes_no_gradient(ranks, found_with, memory, tiles):
    kept_all = found_with(blocks_with, 1, 2, recompute=False)
    for (found, kept), (expected, _) in zip(ranks.run(blocks_with, 1, 2, memory), kept_all):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert kept == tiles


def blocks_and_attentions(cp: ContextParallel, memory: MemoryConfig) -> tuple[list[torch.Tensor], int]:
    """What :func:`blocks_with` gives, and how often attention was computed forward."""
    with mock.patch.object(attention_kernels, "_attended", side_effect=attention_kernels._attended) as attended:
        return blocks_with(cp, memory)[0], attended.call_count


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(keep_attention=True),
        MemoryConfig(keep_attention=True, offload=True),
        MemoryConfig(keep_attention=True, blocks_at_once=2),
        MemoryConfig(keep_attention=True, blocks_at_once=2, offload=True),
        MemoryConfig(keep_attention=True, recompute_updates=True),
        MemoryConfig(keep_attention=True, recompute_updates=True, blocks_at_once=2, offload=True),
    ],
    ids=["blocks", "on the host", "two at once", "two at once on the host", "updates", "all of it"],
)
def test_attention_whose_results_are_kept_is_not_recomputed(ranks, found_with, memory):
    once = found_with(blocks_and_attentions, 1, 2, recompute=False)
    twice = found_with(blocks_and_attentions, 1, 2)
    for (found, computed), (expected, least), (_, most) in zip(
        ranks.run(blocks_and_attentions, 1, 2, memory), once, twice
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert computed == least < most


def test_templates_keep_their_attention_as_well(ranks, found_with):
    memory = MemoryConfig(keep_attention=True, offload=True)
    kept_all = ranks.run(step_and_attentions, 1, 2, MemoryConfig(recompute=False))
    for (found, computed), expected, (_, least) in zip(
        ranks.run(step_and_attentions, 1, 2, memory), found_with(train_step, 1, 2), kept_all
    ):
        torch.testing.assert_close(found, expected[:2], rtol=1e-9, atol=1e-12)
        assert computed == least


def step_and_attentions(cp: ContextParallel, memory: MemoryConfig) -> tuple[tuple, int]:
    """Loss and gradients of :func:`train_step`, and how often attention was computed forward."""
    with mock.patch.object(attention_kernels, "_attended", side_effect=attention_kernels._attended) as attended:
        return train_step(cp, memory)[:2], attended.call_count


def test_what_is_kept_on_the_host_comes_back_once_and_one_boundary_ahead(monkeypatch):
    """Of blocks that have two representations of four dims, as those of the MSA module."""
    fetched, on_the_way = [], []

    class Kept(offload._Kept):
        def prefetch(self):
            if self._coming is None:
                fetched.append(self)
            super().prefetch()

    monkeypatch.setattr(offload, "_Kept", Kept)
    z, m = (torch.ones(1, 2, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    boundary, boundaries = None, []

    def block(z, m):
        if fetched:
            on_the_way.append(len(fetched))
        return z + m.square(), m * z

    for _ in range(4):
        with offload.kept_on_host(boundary) as boundary:
            z, m = recompute(block, z, m)
        boundaries.append(boundary)
    (z + m).sum().backward()
    assert on_the_way == [4, 6, 8, 8]
    assert set(fetched) == {kept for boundary in boundaries for kept in boundary.kept}


def test_residual_stream_in_bf16(ranks):
    """z is rounded between blocks, and what is kept of the rounded z gives its exact gradients."""
    ((exact, _),) = ranks.run(blocks_with, 1, 1, MemoryConfig())
    ((rounded, _),) = ranks.run(blocks_with, 1, 1, MemoryConfig(recompute=False, residual="bf16"))
    ((found, _),) = ranks.run(blocks_with, 1, 1, MemoryConfig(blocks_at_once=2, residual="bf16", offload=True))
    torch.testing.assert_close(found, rounded, rtol=1e-12, atol=1e-12)
    change = (rounded[1] - exact[1]).norm() / exact[1].norm()
    assert 1e-4 < change < 1e-2 and torch.equal(rounded[1], rounded[1].bfloat16().double())


def test_dropout_is_positioned():
    wide = draws().uniform(0, 1000)
    assert torch.equal(wide[:, 300:310], draws().uniform(300, 310))
    assert (wide[0] != wide[1]).all() and abs(wide.mean() - 0.5) < 0.03
    assert not torch.equal(draws().at("a").uniform(0, 9), draws().at("b").uniform(0, 9))
