"""Sums that travel to their owners, and what is drawn by position."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.parallel import exchange_plan
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.exchange_plan import ExchangePlan
from cpfold_train.parallel.grid import Grid, split
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.parallel.redistribute import finish, finish_added, start, sum_to_owners

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


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), pytest.param((3, 3), marks=pytest.mark.slow)])
def test_sum_to_owners(ranks, shape):
    parts = ranks.run(summed, *shape)
    size = shape[0] * shape[1]
    expected = torch.zeros(2, N, 3, dtype=torch.float64)
    for (lo, hi), x in zip(intervals(size), addends(size)):
        expected[:, lo:hi] += x
    torch.testing.assert_close(torch.cat([out for out, _ in parts], 1), expected)
    for (lo, hi), (_, grad) in zip(intervals(size), parts):
        torch.testing.assert_close(grad, weights()[:, lo:hi])


def added(cp, dim: int | None) -> list[tuple[torch.Tensor, ...]]:
    """z with the next rank's rows added in two parts, times factors of ``dim``, and all gradients: of finish_added, and
    of the parts joined first. z is transposed, the update narrower."""
    size, n, generator = cp.all.size, 8, torch.Generator().manual_seed(cp.all.index)
    x, z, weight = torch.randn(3, 2, n, n, 4, generator=generator, dtype=torch.float64).unbind()
    factors = torch.arange(2 * n, dtype=torch.float32).view(2, n, 1)
    factors = None if dim is None else factors[:, :, None] if dim == 1 else factors[:, None]
    has = tuple(((n // 2 * p, n // 2 * (p + 1)),) for p in range(size))
    wants = has[1:] + has[:1]
    outcomes = []
    for fused in (True, False):
        x, z = (y.detach().float().requires_grad_() for y in (x, z))
        going = [start(part, cp, cp.all, (1,), has, wants, "rows") for part in x.bfloat16().chunk(2, 1)]
        if fused:
            out = finish_added(going, z.transpose(1, 2), factors)
        else:
            update = torch.cat([finish(part) for part in going], 1)
            out = z.transpose(1, 2) + (update if factors is None else factors * update)
        outcomes.append((out.detach(), *torch.autograd.grad((out * weight.float()).sum(), [x, z])))
    return outcomes


@pytest.mark.parametrize("shape, dim", [((1, 1), 1), ((1, 2), 2), ((2, 3), 1), ((1, 2), None)])
def test_parts_of_an_update_are_added_where_they_arrive(ranks, shape, dim):
    for fused, joined in ranks.run(added, *shape, dim):
        assert fused[0].transpose(1, 2).is_contiguous()
        for found, expected in zip(fused, joined):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch, in_place", [(1, True), (2, False)])
def test_what_is_contiguous_there_is_received_where_it_belongs(monkeypatch, batch, in_place):
    """Rows of one sample are, those of several are not; forward and for the gradient."""
    received = []

    class Watched(Exchange):
        def __init__(self, axis, op, ledger, sends, receives):
            received.append(list(receives.values()))
            super().__init__(axis, op, ledger, sends, receives)

    monkeypatch.setattr(exchange_plan, "Exchange", Watched)
    rows = (((0, 4),), ((4, 8),))
    with fake_world(Grid(2, 1)) as cp:
        plan = ExchangePlan(cp, cp.all, (1,), rows, (((0, 8),), ((8, 8),)), "rows")
        out = plan.send_forward(torch.zeros(batch, 4, 3)).wait()
        there = ExchangePlan(cp, cp.all, (1,), (((0, 8),), ((8, 8),)), rows, "rows")
        there.send_forward(torch.zeros(batch, 8, 3))
        back = there.send_grad(torch.zeros(batch, 4, 3)).wait()
    (forward,), _, (gradient,) = received
    assert (forward.data_ptr() == out[:, 4:].data_ptr()) is in_place
    assert (gradient.data_ptr() == back[:, 4:].data_ptr()) is in_place


def test_normal_draws_are_positioned_and_normal():
    draws = RandomStreams(torch.tensor([5, 6])).at("noise")
    x = draws.normal(0, 100_000)
    assert torch.equal(x[:, 700:900], draws.normal(700, 900))
    assert x.mean(1).abs().max() < 0.015
    assert (x.var(1) - 1).abs().max() < 0.02
    assert (x.double().pow(4).mean(1) - 3).abs().max() < 0.15
    assert torch.corrcoef(x)[0, 1].abs() < 0.015
    assert (x[:, 1:] * x[:, :-1]).mean(1).abs().max() < 0.015
