"""Dropout of many layers that is drawn at once: the same as each layer would draw by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.model.config import MemoryConfig, MSAConfig, PairformerConfig, TemplateConfig
from cpfold_train.model.msa import MSALayer, MSAModule
from cpfold_train.model.pair_stack import SITES, PairStack
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.model.templates import TemplateV2Module
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.inputs import make_features

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
