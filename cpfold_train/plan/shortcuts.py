"""What is done otherwise where tensors have no contents.

A tile is computed some rows at a time, which on 3,072 tokens is thousands of blocks. Without contents they are all the
same, so two of them show what memory is held, and stand for the work of all. And what goes to the host does so in name
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cpfold_train.losses import smooth_lddt
from cpfold_train.ops import biased_attention, by_rows, offload, partial_attention, ring_attention, window_attention
from cpfold_train.plan.trace import ELSEWHERE, Tracer


@contextmanager
def two_blocks_for_all(tracer: Tracer) -> Iterator[None]:
    """Inside, loops over blocks run twice, and the tracer counts the second time for all that are left out."""

    def of_slices(block: Any) -> int:
        slices = block if isinstance(block, tuple) else (block,)
        size = 1
        # The keys of a window follow from its queries.
        for part in slices[:2]:
            if part.stop is None:
                return 1
            size *= part.stop - part.start
        return size

    def shortened(blocks: Callable[..., Iterator[Any]], size: Callable[[Any], int]) -> Callable[..., Iterator[Any]]:
        def some(*args: Any) -> Iterator[Any]:
            first, *others = blocks(*args)
            yield first
            if others:
                with tracer.times(sum(map(size, others)) / size(others[0])):
                    yield others[0]

        return some

    scores = shortened(biased_attention.score_blocks, of_slices)
    with ExitStack() as stack:
        for module, name, function in (
            (by_rows, "_blocks", shortened(by_rows._blocks, of_slices)),
            (window_attention, "_blocks", shortened(window_attention._blocks, of_slices)),
            (smooth_lddt, "_near_pairs", shortened(smooth_lddt._near_pairs, lambda pairs: len(pairs[0]))),
            *((module, "score_blocks", scores) for module in (biased_attention, partial_attention, ring_attention)),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield


@contextmanager
def host_is_elsewhere(tracer: Tracer) -> Iterator[None]:
    """Inside, what is kept on the host is not counted: it is for plans of GPUs."""

    class Kept(offload._Kept):
        def __init__(self, *args: Any) -> None:
            with tracer.category(ELSEWHERE):
                super().__init__(*args)

    with mock.patch.object(offload, "_Kept", Kept):
        yield
