"""What the MSA module holds, and what it looks up."""

from __future__ import annotations

import torch

from cpfold_train.bench.simulate import LiveMemory
from cpfold_train.ops.pair_weighted_averaging import pair_weighted_averaging

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
