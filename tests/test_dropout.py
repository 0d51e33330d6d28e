"""Dropout: what a mask is, whom it is for, and that of many layers, which is drawn at once as each would by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.data.stream.batch import collate
from cpfold_train.model.config import MemoryConfig, MSAConfig, PairformerConfig, TemplateConfig
from cpfold_train.model.msa import MSALayer, MSAModule
from cpfold_train.model.pair_stack import SITES, PairStack
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.model.templates import TemplateV2Module
from cpfold_train.ops.dropout import row_factors
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.inputs import make_features
from cpfold_train.training.module import CoFoldingModule
from tests.golden.case import CONFIG, DRAWN, OPTIM, SEED, WEIGHTS, crops
from tests.parity import randomise

P, P_MSA = 0.25, 0.15
N, S, C_Z, TEMPLATES = 6, 4, 8, 2
DRAWS = RandomStreams(torch.tensor([3]))
MEMORY = MemoryConfig(blocks_at_once=2)


def test_several_sites_at_once_draw_what_each_draws():
    draws = RandomStreams(torch.tensor([3, -4]))
    found = draws.each("block", last=range(3)).each(last=SITES)
    assert found.keys.shape == (3, 4, 2)
    for i in range(3):
        for k, site in enumerate(SITES):
            one = draws.at("block", i).at(site)
            assert torch.equal(found.uniform(5, 9)[i, k], one.uniform(5, 9))
            assert torch.equal(found.normal(5, 9)[i, k], one.normal(5, 9))


def test_of_no_site_there_is_nothing_to_draw():
    assert RandomStreams(torch.tensor([3, -4])).each("block", last=range(0)).each(last=SITES).uniform(5, 9).shape == (
        0,
        4,
        2,
        4,
    )


def test_copies_are_in_the_order_of_repeat_interleave():
    draws = RandomStreams(torch.tensor([3, -4]))
    found = draws.copies(3).keys.view(2, 3)
    assert all(torch.equal(found[:, k], draws.at("copy", k).keys) for k in range(3))


Built = tuple[nn.Module, Callable[..., Tensor], dict[str, list[RandomStreams]]]
"""A module, its call with the grid and z, and the streams of each of its layers by name; of templates several."""


def pairformer() -> Built:
    module = PairformerModule(4, C_Z, PairformerConfig(3, 2, P, 4, 2), MEMORY)
    own = {f"layers.{i}": [DRAWS.at("pairformer", i)] for i in range(3)}
    return module, lambda cp, z: module(torch.randn(1, N, 4), z, torch.ones(1, N), cp, DRAWS)[1], own


def msa() -> Built:
    module = MSAModule(4, C_Z, MSAConfig(4, 3, P_MSA, P, 4, 2), MEMORY)
    feats = {"msa": torch.ones(1, S, N).long(), "msa_mask": torch.ones(1, S, N), "token_pad_mask": torch.ones(1, N)}
    feats |= {name: torch.zeros(1, S, N) for name in ("has_deletion", "deletion_value", "msa_paired")}
    own = {f"layers.{i}": [DRAWS.at("msa_module", i)] for i in range(3)}
    return module, lambda cp, z: module(z, torch.randn(1, N, 4), feats, cp, DRAWS), own


def templates() -> Built:
    module = TemplateV2Module(C_Z, TemplateConfig(4, 3, P, 4, 2), MEMORY)

    def call(cp, z: Tensor) -> Tensor:
        feats = make_features(("z",), Sizes(N, S, 48, 1), cp.grid, torch.device("cpu"))
        names = [name for name in feats if name.startswith("template_")] + ["visibility_ids"]
        several = {name: feats[name][:, :1].repeat_interleave(TEMPLATES, 1) for name in names}
        return module(z, feats | several, cp, DRAWS)

    own = {
        f"pairformer.layers.{i}": [DRAWS.at("template_module", t).at("block", i) for t in range(TEMPLATES)]
        for i in range(3)
    }
    return module, call, own


def given(cp, build: Callable) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """What the pair stacks of a module are given in a forward and backward pass, and the blocks of the MSA for their
    sequences; by name of the layer."""
    module, call, _ = build()
    names, found = {layer: name for name, layer in module.named_modules()}, (defaultdict(list), defaultdict(list))
    update_pairs, forward = PairStack.update_pairs, MSALayer.forward

    def seen(self, z, token_mask, cp, dropout):
        found[0][names[self].removesuffix(".pairformer_layer")].append(dropout)
        return update_pairs(self, z, token_mask, cp, dropout)

    def seen_of_msa(self, *args):
        found[1][names[self]].append(args[-1])
        return forward(self, *args)

    PairStack.update_pairs, MSALayer.forward = seen, seen_of_msa
    try:
        call(cp, torch.randn(1, N, N, C_Z, requires_grad=True)).sum().backward()
    finally:
        PairStack.update_pairs, MSALayer.forward = update_pairs, forward
    return found


def factors(draws: RandomStreams, p: float, count: int) -> Tensor:
    return (draws.uniform(0, count) >= p).float() / (1 - p)


@pytest.mark.parametrize("build", [pairformer, msa, templates])
def test_each_layer_is_given_its_own_dropout_also_when_it_is_computed_again(ranks, build):
    ((pairs, sequences),) = ranks.run(given, 1, 1, build)
    own = build()[2]
    assert pairs.keys() == own.keys()
    for name, draws in own.items():
        expected = [torch.stack([factors(one.at(site), P, N) for site in SITES]) for one in draws]
        assert len(pairs[name]) >= 2 * len(expected)
        for found in pairs[name]:
            assert sum(torch.equal(found, x) for x in expected) == 1
        for x in expected:
            assert sum(torch.equal(found, x) for found in pairs[name]) >= 2
        if build is msa:
            assert len(sequences[name]) >= 2
            assert all(torch.equal(x, factors(draws[0].at("msa"), P_MSA, S)) for x in sequences[name])


def masks_given(cp) -> tuple[list[tuple[str, Tensor | None]], list[tuple[str, Tensor | None]]]:
    """Name of the pair stack and its masks (4, B, N), call by call, in a training step with one recycling and in a
    validation step. Nothing is recomputed, so each call draws its own."""
    dropped = replace(
        CONFIG,
        msa=replace(CONFIG.msa, z_dropout=P, msa_dropout=P_MSA),
        pairformer=replace(CONFIG.pairformer, dropout=P),
        template=replace(CONFIG.template, template_blocks=2, dropout=P),
        confidence=replace(CONFIG.confidence, pairformer=replace(CONFIG.pairformer, dropout=P)),
    )
    module = CoFoldingModule(
        dropped, MemoryConfig(recompute=False), OPTIM, WEIGHTS, replace(DRAWN, validation_steps=2), SEED
    )
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    names, update_pairs = {layer: name for name, layer in module.model.named_modules()}, PairStack.update_pairs
    batch = collate(crops(), cp.grid) | {"filler": torch.zeros(2, dtype=torch.bool)}
    given = []

    def noted(self, z, token_mask, cp, dropout):
        given.append((names[self], dropout))
        return update_pairs(self, z, token_mask, cp, dropout)

    PairStack.update_pairs = noted
    try:
        module.train().micro_batch(batch, 1)
        trained, given = given, []
        module.eval().validation_step(batch, 0)
        return trained, given
    finally:
        PairStack.update_pairs = update_pairs


def test_every_update_of_a_training_step_has_a_mask_of_its_own(ranks):
    """Of every block, cycle, template and site, and of the confidence module; and validation has none."""
    ((trained, validated),) = ranks.run(masks_given, 1, 1)
    # Two cycles of two templates, and of MSA module and Pairformer; confidences of both structures at once.
    calls = {"trunk.template_module": 2 * 2 * 2, "trunk.msa_module": 2 * CONFIG.msa.msa_blocks}
    calls |= {"trunk.pairformer_module": 2 * CONFIG.pairformer.num_blocks, "confidence_module": 2}
    for part, count in calls.items():
        assert sum(name.startswith(part) for name, _ in trained) == count, part
    assert len(trained) == sum(calls.values())
    assert not [name for name, own in trained if own is None]
    masks = [mask for _, own in trained for site in own for mask in site]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    values = torch.cat(masks)
    assert values.unique().tolist() == pytest.approx([0, 1 / (1 - P)])
    assert abs((values == 0).float().mean() - P) < 0.02
    assert len(validated) > 8 and all(mask is None for _, mask in validated)


def test_a_share_p_is_dropped_and_the_mean_stays():
    found = row_factors(P_MSA, (0, 40_000), DRAWS)
    assert abs((found == 0).float().mean() - P_MSA) < 0.01
    assert abs(found.mean() - 1) < 0.01
    assert row_factors(P, (0, N), None) is None and row_factors(0.0, (0, N), DRAWS) is None


@torch.no_grad()
def updates_of_sites(cp, patterns: Tensor) -> list[list[Tensor]]:
    """What each site of a pair stack adds to z by itself, with factors (K, N) of its rows or columns."""
    stack = PairStack(C_Z, 4, 2).double()
    randomise(stack)
    nn.init.zeros_(stack.transition_z.fc3.weight)
    z = torch.randn(1, N, N, C_Z, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for site in range(len(SITES)):
        alone = torch.zeros(len(patterns), len(SITES), 1, N, dtype=torch.float64)
        alone[:, site, 0] = patterns
        found.append([stack.update_pairs(z, torch.ones(1, N).double(), cp, dropout) - z for dropout in alone])
    return found


def test_whole_rows_are_dropped_and_columns_around_the_ending_node(ranks):
    patterns = torch.stack([torch.ones(N), torch.arange(N) % 2 * 2.0]).double()
    (found,) = ranks.run(updates_of_sites, 1, 1, patterns)
    for site, (whole, dropped) in zip(SITES, found):
        dim = 2 if site == "tri_att_end" else 1
        shape = [-1 if d == dim else 1 for d in range(4)]
        assert whole.abs().amin((0, 3)).max() > 1e-3
        torch.testing.assert_close(
            dropped, whole * patterns[1].view(shape), msg=lambda text, site=site: f"{site}: {text}"
        )


@torch.no_grad()
def m_updates(cp, factors: Tensor) -> Tensor:
    """What a block of the MSA module adds to m."""
    layer = MSALayer(MSAConfig(4, 1, P_MSA, P, 4, 2), C_Z).double()
    randomise(layer)
    nn.init.zeros_(layer.msa_transition.fc3.weight)
    draw = torch.Generator().manual_seed(1)
    z, m = (torch.randn(1, n, N, c, generator=draw, dtype=torch.float64) for n, c in ((N, C_Z), (S, 4)))
    ones = torch.ones(1, N).double(), torch.ones(1, S, N).double(), torch.full((1, N, N), float(S)).double()
    dropout = torch.ones(4, 1, N).double()
    dropout[:, :, ::2] = 0
    return layer(z, m, *ones, cp, dropout, factors[None])[1] - m


def test_whole_sequences_of_the_alignment_are_dropped(ranks):
    factors = torch.tensor([0.0, 2.0, 1.0, 0.0]).double()
    (whole,), (dropped,) = (ranks.run(m_updates, 1, 1, x) for x in (torch.ones(S).double(), factors))
    assert whole.abs().amin() > 1e-6
    torch.testing.assert_close(dropped, whole * factors[:, None, None])


class Hashed(TorchDispatchMode):
    """Counts the steps of the generator of draws."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::bitwise_xor"
        return func(*args, **(kwargs or {}))


def operations(cp, blocks: int) -> int:
    module = PairformerModule(4, C_Z, PairformerConfig(blocks, 2, P, 4, 2), MemoryConfig())
    s, z = torch.randn(1, N, 4), torch.randn(1, N, N, C_Z, requires_grad=True)
    with Hashed() as hashed:
        module(s, z, torch.ones(1, N), cp, DRAWS)[1].sum().backward()
    return hashed.count


def test_a_layer_more_costs_one_operation(ranks):
    """Its key; all else is done for all layers at once. On a GPU each operation is a launch."""
    few, many = (ranks.run(operations, 1, 1, blocks)[0] for blocks in (2, 7))
    assert many - few == 5
