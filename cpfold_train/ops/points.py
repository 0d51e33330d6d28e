"""Products of positions and noise levels, which nothing may round.

A matrix product in fp32 may go through TF32 on a GPU (the key ``tf32``), which rounds a coordinate of 100 Angstrom to
0.06. So there these are calculated component by component, of which there are few.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def products_are_exact(x: Tensor) -> bool:
    """Whether a matrix product of x is as exact as its dtype, whatever the settings: on CPU."""
    return x.device.type == "cpu"


def linear_of_points(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., k) times the transpose of (c, k), of few components k."""
    if products_are_exact(x):
        return linear(x, weight, bias)
    out = by_component(x, weight.T)
    return out if bias is None else out + bias


def turned(points: Tensor, rotation: Tensor) -> Tensor:
    """(..., n, 3) times (..., 3, 3)."""
    return points @ rotation if products_are_exact(points) else by_component(points, rotation)


def by_component(x: Tensor, matrix: Tensor) -> Tensor:
    """(..., n, k) times (..., k, c) as a sum of k outer products."""
    return sum(x[..., k, None] * matrix[..., k, None, :] for k in range(matrix.shape[-2]))
