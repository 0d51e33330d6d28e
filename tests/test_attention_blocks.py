"""Attention in blocks of rows and queries gives what the formula gives, with every gradient."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch

from cpfold_train.kernels import blockwise_attention as blocks
from cpfold_train.kernels.attention import biased_attention, in_cuequivariance
from cpfold_train.kernels.partial_attention import add_part
from cpfold_train.model.pair_stack import TriangleAttentionStartingNode
from cpfold_train.ops.ring_attention import ring_attention
from cpfold_train.parallel.exchange_plan import ExchangePlan

B, ROWS, HEADS, N, WIDTH = 2, 5, 3, 40, 4


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, ROWS, HEADS, N, WIDTH)] * 3 + [(B, HEADS, N, N)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[3][1, :, :, 30:] = -1e9
    return [x.requires_grad_() for x in tensors]


def with_gradients(function) -> list[torch.Tensor]:
    tensors = inputs()
    out = function(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


def formula(q, k, v, bias):
    return torch.softmax(q @ k.mT + bias[:, None], -1) @ v


@pytest.fixture
def small_blocks(monkeypatch):
    """17 queries and 2 rows at a time: neither divides what there is."""
    monkeypatch.setattr(blocks, "rows_per_block", lambda *_: 2)


def test_blocks(small_blocks):
    q, _, _, bias = inputs()
    assert len(list(blocks.score_blocks(q, bias))) == 9
    for actual, expected in zip(with_gradients(biased_attention), with_gradients(formula)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_log_sum_exp_and_results_over_some_keys_merge(small_blocks):
    q, k, v, bias = (x.detach() for x in inputs())
    out, lse = blocks.blockwise_attention(q, k, v, bias, with_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT + bias[:, None], -1), rtol=1e-12, atol=1e-12)
    first, last = (
        blocks.blockwise_attention(q, k[..., keys, :], v[..., keys, :], bias[..., keys], with_lse=True)
        for keys in (slice(0, 7), slice(7, None))
    )
    merged = add_part(*first, *last)
    torch.testing.assert_close((first[0], merged), (out, lse), rtol=1e-12, atol=1e-12)


def triangle_attention(q, k, v, bias, mask=None, scale=None, return_aux=False, *, kv_lengths=None):
    """What the cuEquivariance package calls so, in plain torch."""
    batch, _, heads, queries, _ = q.shape
    assert bias.shape == (batch, 1, heads, queries, k.shape[3]) and not (mask or return_aux or kv_lengths)
    return torch.softmax(scale * q @ k.mT + bias, -1) @ v


def stand_in() -> tuple[ModuleType, list[tuple[int, ...]]]:
    """A module with :func:`triangle_attention`, and the shapes of the queries it got."""

    def counted(q, *args, **kwargs):
        calls.append(tuple(q.shape))
        return triangle_attention(q, *args, **kwargs)

    calls: list[tuple[int, ...]] = []
    module = ModuleType("cuequivariance_torch")
    module.triangle_attention = counted
    return module, calls


def test_the_stand_in_takes_what_cuequivariance_takes():
    package = pytest.importorskip("cuequivariance_torch", reason="the package of cuEquivariance is not installed")
    theirs, ours = (inspect.signature(f).parameters for f in (package.triangle_attention, triangle_attention))
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert (parameter.kind, parameter.default) == (theirs[name].kind, theirs[name].default), name


@pytest.mark.parametrize(
    "dtype, queries, width, fits",
    [
        (torch.bfloat16, 101, 32, True),
        (torch.bfloat16, 100, 32, False),
        (torch.bfloat16, 200, 24, False),
        (torch.bfloat16, 201, 24, True),
        (torch.bfloat16, 300, 20, False),
        (torch.bfloat16, 300, 136, False),
        (torch.float32, 300, 32, True),
        (torch.float32, 300, 48, False),
        (torch.float64, 300, 32, False),
    ],
)
def test_what_would_fall_back_to_torch_does_not_go_to_cuequivariance(dtype, queries, width, fits):
    assert in_cuequivariance(torch.empty(1, 1, 1, queries, width, dtype=dtype)) == fits


def test_kernel_of_cuequivariance_is_called_as_it_wants_to_be(monkeypatch):
    module, calls = stand_in()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (torch.randn(size, generator=generator) for size in [(2, 1, 2, 208, 8)] * 3 + [(2, 2, 208, 208)])
    torch.testing.assert_close(biased_attention(q, k, v, bias, "cuequivariance"), formula(q, k, v, bias))
    assert calls == [tuple(q.shape)]


def attend_with(cp, kernels: str) -> tuple[list[torch.Tensor], int]:
    """A triangle attention's result and gradients on this rank, and how often the stand-in was called."""
    module, calls = stand_in()
    sys.modules[module.__name__] = module
    algorithm, cp.algorithm, cp.kernels = cp.algorithm, "alltoall", kernels
    try:
        torch.manual_seed(0)
        layer = TriangleAttentionStartingNode(8, 4, 2)
        torch.nn.init.normal_(layer.mha.linear_o.weight)
        z = torch.randn(1, 208 // cp.grid.rows, 208 // cp.grid.cols, 8)
        out = layer(z, torch.ones(1, 208), cp)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), layer.parameters())], len(calls)
    finally:
        cp.algorithm, cp.kernels = algorithm, "torch"
        del sys.modules[module.__name__]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_kernels_are_chosen_by_the_running_grid(ranks, grid):
    with_torch, with_stand_in = (ranks.run(attend_with, *grid, kernels) for kernels in ("torch", "cuequivariance"))
    for (_, never), (_, calls) in zip(with_torch, with_stand_in):
        assert never == 0 < calls
    # Which rank adds what to the gradient of a parameter depends on what travels, z or its norm.
    actual, expected = ([sum(x) for x in zip(*(found for found, _ in way))] for way in (with_stand_in, with_torch))
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def ring(cp) -> list[torch.Tensor]:
    def function(q, k, v, bias):
        kv, has = torch.stack([k, v], -2), (((0, ROWS), (0, N)),)
        parts = [(0, 25), (25, N)]
        steps = [
            (
                ExchangePlan(cp, cp.all, (1, 3), has, (((0, ROWS), part),), "test"),
                ExchangePlan(cp, cp.all, (2, 3), (((0, N), (0, N)),), (((0, N), part),), "test"),
            )
            for part in parts
        ]
        return ring_attention(q, kv, bias, steps, "torch")

    original, blocks.rows_per_block = blocks.rows_per_block, lambda *_: 2
    try:
        return with_gradients(function)
    finally:
        blocks.rows_per_block = original


def test_ring_in_blocks(ranks):
    (actual,) = ranks.run(ring, 1, 1)
    for one, other in zip(actual, with_gradients(formula)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
