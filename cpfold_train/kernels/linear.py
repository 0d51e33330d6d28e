"""The linear layers of pair stacks, transitions and the outer product mean, which a run can have computed otherwise.

They take weights and not modules, many of them joined or scaled first, so that replacing modules would not reach them.
And the products that are none of these: of positions and noise levels, which nothing may round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor, Tensor], Tensor]
_instead: list[Linear] = []


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., c_in) times the transpose of (c_out, c_in): ``torch.nn.functional.linear``, or what :func:`linear_by`
    names."""
    return _instead[-1](x, weight) if _instead else F.linear(x, weight)


def is_replaced() -> bool:
    """Whether :func:`linear_by` names something else: kernels with products of their own must then not be used."""
    return bool(_instead)


def linear_of_points(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., k) times the transpose of (c, k), of few components k: positions, offsets, noise levels.

    On a GPU component by component: a matrix product in fp32 may go through TF32 (the key ``tf32``), which rounds a
    coordinate of 100 Angstrom to 0.06.
    """
    if x.device.type == "cpu":
        return F.linear(x, weight, bias)
    out = by_component(x, weight.T)
    return out if bias is None else out + bias


def turned(points: Tensor, rotation: Tensor) -> Tensor:
    """(..., n, 3) times (..., 3, 3), as :func:`linear_of_points`."""
    return points @ rotation if points.device.type == "cpu" else by_component(points, rotation)


def by_component(x: Tensor, matrix: Tensor) -> Tensor:
    """(..., n, k) times (..., k, c) as a sum of k outer products."""
    return sum(x[..., k, None] * matrix[..., k, None, :] for k in range(matrix.shape[-2]))


@contextmanager
def linear_by(function: Linear) -> Iterator[None]:
    """A region in which ``function`` computes :func:`linear`, in all threads: the backward pass has its own."""
    _instead.append(function)
    try:
        yield
    finally:
        _instead.pop()
