"""What communication costs: bytes sent, messages and time actually waited, per operation, on this rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass
class Entry:
    """Totals of one operation."""

    sent_bytes: int = 0
    messages: int = 0
    waited_s: float = 0.0


class Place(NamedTuple):
    """Where this rank is: waiting for others in an operation, or at work after it, and since when."""

    op: str
    waiting: bool
    since: float
    """Of ``time.monotonic()``."""


class Ledger:
    """Counts what this rank sends and how long it stands waiting for what it receives.

    On CUDA the wait is measured between two events on the compute stream, so that counting never stalls the host;
    the events are read when somebody asks for the figures.

    Attributes:
        place: where this rank is now, for whoever wants to know why it does not answer.
    """

    def __init__(self) -> None:
        self.place = Place("the start", False, time.monotonic())
        self._entries: defaultdict[str, Entry] = defaultdict(Entry)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def sent(self, op: str, n_bytes: int, messages: int = 1) -> None:
        """Book bytes that leave this rank on behalf of ``op``."""
        entry = self._entries[op]
        entry.sent_bytes += n_bytes
        entry.messages += messages

    @contextmanager
    def waiting(self, op: str, device: torch.device) -> Iterator[None]:
        """Book the time spent inside the block as exposed communication of ``op``."""
        if device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            with self.standing(op):
                yield
            after.record()
            self._events.append((op, before, after))
        else:
            start = time.perf_counter()
            with self.standing(op):
                yield
            self._entries[op].waited_s += time.perf_counter() - start

    @contextmanager
    def standing(self, op: str) -> Iterator[None]:
        """Say where this rank waits, without booking it. An error leaves :attr:`place` as it is: it happened there."""
        self.place = Place(op, True, time.monotonic())
        yield
        self.place = Place(op, False, time.monotonic())

    def by_op(self) -> dict[str, Entry]:
        """Totals since the start, per operation."""
        for op, before, after in self._events:
            after.synchronize()
            self._entries[op].waited_s += before.elapsed_time(after) / 1000
        self._events.clear()
        return dict(self._entries)

    def total(self) -> Entry:
        """Totals since the start, over all operations."""
        entries = self.by_op().values()
        return Entry(
            sum(e.sent_bytes for e in entries), sum(e.messages for e in entries), sum(e.waited_s for e in entries)
        )

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.by_op()
        self._entries.clear()
