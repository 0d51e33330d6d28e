"""Sums over many parts keep their precision when the parts are bf16."""

import torch

from cpfold_train.ops import outer_product_mean as opm
from cpfold_train.ops.by_rows import by_rows
from cpfold_train.ops.shares import gather_shares

BF16 = torch.bfloat16


def test_gradient_of_a_shared_bf16_tensor_is_summed_in_fp32():
    x = torch.ones(1, 768, 1, dtype=torch.bfloat16)
    shared = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    by_rows(lambda x, w: x * w, 1, (x,), (shared,)).sum().backward()
    assert shared.grad.dtype == torch.bfloat16 and shared.grad.item() == 768


def pieces(cp):
    """The outer product mean of 768 sequences that come one by one."""
    m, count = torch.ones(1, 768, 1, 1, dtype=BF16), torch.ones(1, 1, 1)
    at_a_time, opm.SEQUENCES = opm.SEQUENCES, 1
    try:
        return opm.outer_product_mean(m, m, count, torch.ones(1, 1, dtype=BF16), torch.zeros(1, dtype=BF16), cp)
    finally:
        opm.SEQUENCES = at_a_time


def test_pieces_that_come_in_turn_are_summed_in_fp32(ranks):
    (out,) = ranks.run(pieces, 1, 1)
    assert out.dtype == BF16 and out.item() == 768


def gradient_from_all_ranks(cp):
    """What nine ranks find for the share of the first one: 256 and eight ones. In bf16, 256 + 1 is 256."""
    x = torch.zeros(1, 1, dtype=BF16, requires_grad=True)
    everything = gather_shares(x, cp, "test")
    (everything[:, 0] * (256 if cp.all.index == 0 else 1)).sum().backward()
    return x.grad


def test_gradients_of_several_ranks_are_summed_in_fp32(ranks):
    first, *_ = ranks.run(gradient_from_all_ranks, 3, 3)
    assert first.dtype == BF16 and first.item() == 264
