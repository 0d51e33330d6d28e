"""Named tuples of tensors among the arguments of what is computed a few rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import by_rows, in_blocks

ROWS, WIDTH = 5, 3


class Rows(NamedTuple):
    x: Tensor
    scale: Tensor


class Weights(NamedTuple):
    weight: Tensor
    bias: Tensor


def projected(z: Tensor, rows: Rows, w: Weights, last: Tensor) -> Tensor:
    assert isinstance(rows, Rows) and isinstance(w, Weights)
    return (z + rows.x * rows.scale) @ w.weight + w.bias * last


@pytest.mark.parametrize("at_once", [2, ROWS])
def test_named_tuples_come_as_they_are(at_once):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, ROWS, WIDTH)] * 3 + [(WIDTH, 4), (4,), (4,)]
    z, x, scale, weight, bias, last = tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]
    inputs, shared = (z, Rows(x, scale)), (Weights(weight, bias), last)
    expected = projected(*inputs, *shared)
    out = by_rows(projected, at_once, inputs, shared)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(in_blocks(projected, at_once, inputs, shared), out)
    for found, grad in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (out, expected))):
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)
