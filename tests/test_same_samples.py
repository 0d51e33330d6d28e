"""Ranks that share a sample notice where one of them holds another."""

from __future__ import annotations

import re

import pytest
import torch

from cpfold_train.errors import DataError
from cpfold_train.training.same_samples import check_same_samples


def answer(cp, odd_rank, change):
    """What the check says on this rank, where one rank of the world differs in one thing."""
    batch = {"id": ["a", "b"], "num_tokens": torch.tensor([5, 4]), "residue_index": torch.arange(10).reshape(2, 5)}
    if cp.grid.rank == odd_rank:
        batch |= change
    try:
        check_same_samples(batch, cp)
    except DataError as error:
        return str(error)
    return None


CHANGES = {
    "sample": {"id": ["a", "c"]},
    "size": {"num_tokens": torch.tensor([5, 3])},
    "crop": {"residue_index": torch.arange(10).reshape(2, 5) + 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_sample_is_noticed(ranks, change):
    answers = ranks.run(answer, 2, 2, 2, change)
    assert re.match("ranks 2 .*rank 0, .* a, b ", answers[0])
    assert re.match("ranks 0, 1, 3 .*rank 2", answers[2])
    assert all(answers)


def test_replicas_may_differ(ranks):
    assert ranks.run(answer, 1, 2, 9, CHANGES["sample"], dp=2) == [None] * 4
    first, second = ranks.run(answer, 1, 2, 3, CHANGES["sample"], dp=2)[:2], ranks.run(answer, 1, 1, 1, {}, dp=2)
    assert first == [None, None] and second == [None, None]
