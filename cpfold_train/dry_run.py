"""The one place where a run asks whether it is a dry run: a planner's, on tensors without contents.

A step is thousands of blocks of rows, and messages to dozens of ranks. Without contents the blocks of a loop are all
alike, and so are messages of one shape. So each such loop goes through :func:`each_block` or :func:`each_message`, and
each copy to the host and back is made within :func:`to_host` or :func:`from_host`: in a run they do nothing, and a
planner can let a few turns of a loop stand for all, and count copies as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class DryRun(Protocol):
    """What a planner does instead; the methods are those of the functions of this module."""

    def each_block(self, blocks: Iterable[T], size: Callable[[T], float]) -> Iterator[T]: ...

    def each_message(self, messages: Iterable[T], shape: Callable[[T], Any]) -> Iterator[T]: ...

    def to_host(self) -> AbstractContextManager[None]: ...

    def from_host(self) -> AbstractContextManager[None]: ...


# Not a context variable: the backward pass on a GPU has a thread of autograd's, which would not see it.
_dry_run: DryRun | None = None


@contextmanager
def dry(run: DryRun) -> Iterator[None]:
    """Inside, all threads of this process are in a dry run."""
    global _dry_run
    _dry_run = run
    try:
        yield
    finally:
        _dry_run = None


def each_block(blocks: Iterable[T], size: Callable[[T], float]) -> Iterator[T]:
    """Loop over blocks, one after the other.

    Args:
        blocks: what one turn each works on; the memory that a turn takes is free for the next.
        size: the part that a block is of all, in any unit.
    """
    return iter(blocks) if _dry_run is None else _dry_run.each_block(blocks, size)


def each_message(messages: Iterable[T], shape: Callable[[T], Any]) -> Iterator[T]:
    """Loop over messages that are in flight together.

    Args:
        messages: one for each turn.
        shape: equal where two messages are of equal shape.
    """
    return iter(messages) if _dry_run is None else _dry_run.each_message(messages, shape)


def to_host() -> AbstractContextManager[None]:
    """Within it, what is made is on the host, and what fills it comes from the device."""
    return nullcontext() if _dry_run is None else _dry_run.to_host()


def from_host() -> AbstractContextManager[None]:
    """Within it, what is copied comes back from the host."""
    return nullcontext() if _dry_run is None else _dry_run.from_host()
