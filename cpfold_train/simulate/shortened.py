"""The planner's dry run: what is done otherwise where tensors have no contents.

A tile is computed some rows at a time, which on 3,072 tokens is thousands of blocks. Without contents they are all the
same, so two of them show what memory is held, and stand for the work of all. One message stands for all that a rank
exchanges of one shape at a time. And what goes to the host does so in name only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from cpfold_train.parallel.sharding import ShardedParameter
from cpfold_train.simulate.trace import ELSEWHERE, Tracer

T = TypeVar("T")


class Shortened:
    """A :class:`cpfold_train.dry_run.DryRun` whose work a tracer counts.

    Args:
        tracer: counts what is left out, too.
        on_host: whether the run that is planned is on CPU. There every message is made, because what malloc keeps
            depends on the size of each, and what is kept on the host is memory like all other.
    """

    def __init__(self, tracer: Tracer, on_host: bool) -> None:
        self._tracer, self._on_host = tracer, on_host

    def each_block(self, blocks: Iterable[T], size: Callable[[T], float]) -> Iterator[T]:
        """The first block, and the second with the work of all others."""
        first, *others = blocks
        yield first
        if others:
            with self._tracer.times(sum(map(size, others)) / size(others[0])):
                yield others[0]

    def each_message(self, messages: Iterable[T], shape: Callable[[T], Any]) -> Iterator[T]:
        """One of each shape, with the memory, work and traffic of all of its shape."""
        if self._on_host:
            yield from messages
            return
        kinds: defaultdict[Any, list[T]] = defaultdict(list)
        for message in messages:
            kinds[shape(message)].append(message)
        for alike in kinds.values():
            with self._tracer.copies(len(alike)):
                yield alike[0]

    @contextmanager
    def to_host(self) -> Iterator[None]:
        """What is kept on the host takes none of the device's memory, and copies have a link of their own."""
        if self._on_host:
            yield
            return
        with self._tracer.category(ELSEWHERE), self._tracer.over_host_link():
            yield

    def from_host(self) -> AbstractContextManager[None]:
        """Copies have a link of their own."""
        return nullcontext() if self._on_host else self._tracer.over_host_link()


@contextmanager
def weights_come_and_go(tracer: Tracer) -> Iterator[None]:
    """Inside, the tracer sees when FSDP makes room for a block's weights and when it frees them.

    It resizes storages, which is no operation of torch's that a dispatch mode sees: so two functions of torch's own are
    replaced meanwhile.
    """

    resize, make_room = torch.UntypedStorage.resize_, ShardedParameter.init_all_gather_outputs

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        tracer.resized(storage)
        return storage

    def gathered(*args: Any) -> None:
        with tracer.category("gathered"):
            make_room(*args)

    torch.UntypedStorage.resize_, ShardedParameter.init_all_gather_outputs = resize_and_tell, gathered
    try:
        yield
    finally:
        torch.UntypedStorage.resize_, ShardedParameter.init_all_gather_outputs = resize, make_room
