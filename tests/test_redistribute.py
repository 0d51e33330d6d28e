"""Sums that travel to their owners, and what is drawn by position."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.parallel.grid import split
from cpfold_train.parallel.random import Draws
from cpfold_train.parallel.redistribute import sum_to_owners

N = 20


def intervals(ranks: int) -> list[tuple[int, int]]:
    """Overlapping, uneven ranges: rank p has addends from its own part's start to three places beyond its end."""
    return [(lo, min(N, hi + 3)) for lo, hi in split(N, ranks)]


def addends(ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, hi - lo, 3, generator=generator, dtype=torch.float64) for lo, hi in intervals(ranks)]


def weights() -> torch.Tensor:
    return torch.randn(2, N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def summed(cp):
    me, size = cp.all.index, cp.all.size
    x = addends(size)[me].requires_grad_()
    owns = split(N, size)
    has = tuple((interval,) for interval in intervals(size))
    out = sum_to_owners(x, cp, cp.all, (1,), has, tuple((interval,) for interval in owns), "a sum")
    (out * weights()[:, slice(*owns[me])]).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (3, 3)])
def test_sum_to_owners(ranks, shape):
    parts = ranks.run(summed, *shape)
    size = shape[0] * shape[1]
    expected = torch.zeros(2, N, 3, dtype=torch.float64)
    for (lo, hi), x in zip(intervals(size), addends(size)):
        expected[:, lo:hi] += x
    torch.testing.assert_close(torch.cat([out for out, _ in parts], 1), expected)
    for (lo, hi), (_, grad) in zip(intervals(size), parts):
        torch.testing.assert_close(grad, weights()[:, lo:hi])


def test_normal_draws_are_positioned_and_normal():
    draws = Draws(torch.tensor([5, 6])).at("noise")
    x = draws.normal(0, 100_000)
    assert torch.equal(x[:, 700:900], draws.normal(700, 900))
    assert x.mean(1).abs().max() < 0.015
    assert (x.var(1) - 1).abs().max() < 0.02
    assert (x.double().pow(4).mean(1) - 3).abs().max() < 0.15
    assert torch.corrcoef(x)[0, 1].abs() < 0.015
    assert (x[:, 1:] * x[:, :-1]).mean(1).abs().max() < 0.015
