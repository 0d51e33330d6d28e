"""What the MSA and the template module hold, look up and compute again."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.model.config import MemoryConfig, MSAConfig, TemplateConfig
from cpfold_train.model.msa import MSAModule
from cpfold_train.model.pair_stack import PairStack
from cpfold_train.model.templates import TemplateV2Module
from cpfold_train.ops.pair_weighted_averaging import pair_weighted_averaging
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.inputs import make_features
from cpfold_train.simulate.bench.simulate import LiveMemory

N, HEADS, WIDTH = 96, 2, 4


def averaging_peak(cp, sequences):
    """Bytes held at most by the forward and backward pass of an average over so many sequences."""
    v = torch.randn(1, sequences, N, HEADS, WIDTH, requires_grad=True)
    logits = torch.randn(1, N, N, HEADS, requires_grad=True)
    with LiveMemory() as memory:
        pair_weighted_averaging(v, logits, torch.ones(1, N), cp).sum().backward()
    return memory.peak


def test_averaging_holds_the_weights_once_and_not_for_each_sequence(ranks):
    (few,), (many,) = ranks.run(averaging_peak, 1, 1, 1), ranks.run(averaging_peak, 1, 1, 65)
    a_sequence = N * HEADS * WIDTH * 4
    assert few > N * N * HEADS * 4
    assert (many - few) / 64 < 8 * a_sequence < N * N * HEADS * 4


class Operations(TorchDispatchMode):
    """Names of what is computed under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def msa_operations(cp):
    """Of the MSA module's forward and backward pass, and the gradient of what it looks tokens up in."""
    module = MSAModule(6, 8, MSAConfig(4, 1, 0.0, 0.0, 4, 2), MemoryConfig(recompute=False))
    s, n = 3, 5
    feats = {"msa": torch.arange(s * n).reshape(1, s, n), "msa_mask": torch.ones(1, s, n)}
    feats |= {name: torch.zeros(1, s, n) for name in ("has_deletion", "deletion_value", "msa_paired")}
    feats["token_pad_mask"] = torch.ones(1, n)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with Operations() as operations:
        module(torch.randn(1, n, n, 8), torch.randn(1, n, 6), feats, cp, None).sum().backward()
    return operations.names, module.msa_proj.weight.grad


def test_tokens_are_looked_up_without_an_indexed_sum_in_the_backward_pass(ranks):
    """On a GPU that is one thread after the other for each of the 33 rows."""
    ((names, grad),) = ranks.run(msa_operations, 1, 1)
    assert "aten::embedding_dense_backward" in names and not any("index_put" in name for name in names)
    assert grad[:, :15].abs().min() > 0 and not grad[:, 15:33].any()


def block_passes(cp, blocks):
    """How often blocks run in a forward and backward pass of the template module, with z twice as wide as they are."""
    module = TemplateV2Module(8, TemplateConfig(4, blocks, 0.0, 4, 2), MemoryConfig(recompute=True))
    feats = make_features(("z",), Sizes(6, 4, 48, 1), cp.grid, torch.device("cpu"))
    passes, update_pairs = [], PairStack.update_pairs

    def counted(self, *args):
        passes.append(self)
        return update_pairs(self, *args)

    PairStack.update_pairs = counted
    try:
        module(torch.randn(1, 6, 6, 8, requires_grad=True), feats, cp, None).sum().backward()
    finally:
        PairStack.update_pairs = update_pairs
    return len(passes) / blocks


@pytest.mark.parametrize("blocks, times", [(2, 2), (3, 3)])
def test_blocks_of_a_template_are_computed_again_once_if_they_are_few(ranks, blocks, times):
    assert ranks.run(block_passes, 1, 1, blocks) == [times]
