"""The linear layers of pair stacks, transitions and the outer product mean, which a run can have computed otherwise.

They take weights and not modules, many of them joined or scaled first, so that replacing modules would not reach them.
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


@contextmanager
def linear_by(function: Linear) -> Iterator[None]:
    """A region in which ``function`` computes :func:`linear`, in all threads: the backward pass has its own."""
    _instead.append(function)
    try:
        yield
    finally:
        _instead.pop()
