"""Results of kernels that are expensive to compute again, kept through the recomputation of what is around them.

Attention takes a time that grows with N^3, and its result memory that grows with N^2. Of a block that is computed again
in the backward pass (:func:`cpfold_train.ops.recompute.recompute`), the result and log-sum-exp of attention are all
that the gradient wants of its forward pass, so keeping them saves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Protocol

from torch import Tensor


class Held(Protocol):
    """A tensor that may be elsewhere until it is taken, as often as one likes."""

    def take(self) -> Tensor:
        """The tensor, on its device."""


class _Here:
    def __init__(self, x: Tensor) -> None:
        self._x = x

    def take(self) -> Tensor:
        return self._x


class KeptResults:
    """Of the kernels of one recomputed part, in the order of their calls.

    Args:
        hold: where a tensor is kept meanwhile, such as :meth:`cpfold_train.ops.offload.Boundary.hold`; by default where
            it is. Of a part within a part the outer one's says it.
    """

    def __init__(self, hold: Callable[[Tensor], Held] = _Here) -> None:
        self.hold = hold
        self._held: deque[list[Held]] = deque()

    @contextmanager
    def made(self) -> Iterator[None]:
        """In the forward pass: kernels are computed, and their results are kept."""
        with _within(_active.making, self):
            yield

    @contextmanager
    def used(self) -> Iterator[None]:
        """In the recomputation: kernels are not computed, and give what they gave before."""
        with _within(_active.using, self):
            yield

    def add(self, held: list[Held]) -> None:
        """Keep what the next kernel gives."""
        self._held.append(held)

    def next(self) -> list[Held]:
        """What the next kernel gave; the last time that it is asked for."""
        return self._held.popleft()


def are_kept() -> bool:
    """Whether this is called in a part that keeps results: those within it have to keep them, too."""
    return bool(_active.making or _active.using)


def kept(kernel: Callable[..., tuple[Tensor, ...]], *args: object) -> tuple[Tensor, ...]:
    """``kernel(*args)``, computed once however often it is called again by a part that keeps its results.

    To be called without autograd, as within the forward pass of an ``autograd.Function``.
    """
    if _active.using:
        held = _active.using[-1].next()
        given = tuple(x.take().detach() for x in held)
    else:
        given = kernel(*args)
        # Detached, or they would keep the graph that is to be forgotten.
        held = [_active.making[0].hold(x.detach()) for x in given] if _active.making else []
    for results in _active.making:
        results.add(held)
    return given


class _Active(local):
    """The parts at work, the innermost last. The backward pass has threads of its own."""

    def __init__(self) -> None:
        self.making: list[KeptResults] = []
        self.using: list[KeptResults] = []


_active = _Active()


@contextmanager
def _within(active: list[KeptResults], results: KeptResults) -> Iterator[None]:
    active.append(results)
    try:
        yield
    finally:
        active.pop()
