"""Attention in blocks of rows and queries gives what the formula gives, with every gradient."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.ops import biased_attention as blocks
from cpfold_train.ops.ring_attention import ring_attention
from cpfold_train.parallel.redistribute import Route

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
    for actual, expected in zip(with_gradients(blocks.biased_attention), with_gradients(formula)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def ring(cp) -> list[torch.Tensor]:
    def function(q, k, v, bias):
        kv, has = torch.cat([k, v], -1), (((0, ROWS), (0, N)),)
        parts = [(0, 25), (25, N)]
        steps = [
            (
                Route(cp, cp.all, (1, 3), has, (((0, ROWS), part),), "test"),
                Route(cp, cp.all, (2, 3), (((0, N), (0, N)),), (((0, N), part),), "test"),
            )
            for part in parts
        ]
        return ring_attention(q, kv, bias, steps)

    original, blocks.rows_per_block = blocks.rows_per_block, lambda *_: 2
    try:
        return with_gradients(function)
    finally:
        blocks.rows_per_block = original


def test_ring_in_blocks(ranks):
    (actual,) = ranks.run(ring, 1, 1)
    for one, other in zip(actual, with_gradients(formula)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
