"""What communication costs: bytes sent, messages and time actually waited, per operation, on this rank."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass
class LedgerEntry:
    """Totals of one operation."""

    sent_bytes: int = 0
    messages: int = 0
    waited_s: float = 0.0


class LedgerPosition(NamedTuple):
    """Where this rank is: waiting for others in an operation, or at work after it, and since when."""

    op: str
    waiting: bool
    since: float
    """Of ``time.monotonic()``."""


class _Wait(NamedTuple):
    """A wait that the host has queued on the device's stream of computation."""

    op: str
    before: torch.cuda.Event
    after: torch.cuda.Event


class Ledger:
    """Counts what this rank sends and how long it stands waiting for what it receives.

    On CUDA ``work.wait()`` blocks the device's stream and not the host, which runs ahead. A wait is then what lies
    between two events on that stream, and it is the stream, not the host, that says where the rank is. The events are
    asked whether the stream has come to them (:meth:`poll`), and nobody waits for them but who asks for the numbers.
    There are as many as there are waits that the host is ahead of the device, and they are used again.

    Attributes:
        posted: waits that the host has come to.
        completed: of those, the ones that are over, on CUDA as far as :meth:`poll` has seen.
    """

    def __init__(self) -> None:
        self.posted = self.completed = 0
        self._host = self._device = LedgerPosition("the start", False, time.monotonic())
        self._entries: defaultdict[str, LedgerEntry] = defaultdict(LedgerEntry)
        self._queued: deque[_Wait] = deque()
        self._spare: list[torch.cuda.Event] = []
        # The watch polls from a thread of its own.
        self._polling = threading.Lock()

    @property
    def position(self) -> LedgerPosition:
        """Where this rank is now, to tell why it does not answer.

        While waits are queued on the device it is where the last :meth:`poll` has found the device: the host is ahead
        of it, or waits for it.
        """
        if self._queued:
            return self._device
        since = max(self._host.since, self._device.since)
        if self._host.waiting:
            return self._host._replace(since=since)
        return self._host if since == self._host.since else self._device

    def sent(self, op: str, n_bytes: int, messages: int = 1) -> None:
        """Book bytes that leave this rank on behalf of ``op``."""
        entry = self._entries[op]
        entry.sent_bytes += n_bytes
        entry.messages += messages

    def arrival(self) -> float:
        """When all that has been sent so far arrives: a planner's ledger knows it, and a run finds out by waiting."""
        return 0.0

    @contextmanager
    def waiting(self, op: str, device: torch.device, arrival: float = 0.0) -> Iterator[None]:
        """Book the time spent inside the block as exposed communication of ``op``.

        Args:
            op: the operation's name.
            device: on which what is received will be.
            arrival: what :meth:`arrival` said when the messages were posted.
        """
        self.posted += 1
        if device.type == "cuda":
            before, after = self._event(), self._event()
            before.record()
            yield
            after.record()
            self._queued.append(_Wait(op, before, after))
            # Keeps the list as short as the device is behind; if the watch is at it just now, that does the same.
            if self._polling.acquire(blocking=False):
                try:
                    self._advance()
                finally:
                    self._polling.release()
        else:
            start = time.perf_counter()
            with self.standing(op):
                yield
            self._entries[op].waited_s += time.perf_counter() - start
            self.completed += 1

    @contextmanager
    def standing(self, op: str) -> Iterator[None]:
        """Say where this rank waits, without booking it. An error leaves :attr:`position`: it happened there."""
        self._host = LedgerPosition(op, True, time.monotonic())
        yield
        self._host = LedgerPosition(op, False, time.monotonic())

    def poll(self) -> None:
        """See how far the device has come. Asks the driver and waits for nothing."""
        with self._polling:
            self._advance()

    def by_op(self) -> dict[str, LedgerEntry]:
        """Totals since the start, per operation."""
        for wait in list(self._queued)[-1:]:
            # Not under the lock: should the device never come there, the watch must be able to see it.
            wait.after.synchronize()
        self.poll()
        return dict(self._entries)

    def total(self) -> LedgerEntry:
        """Totals since the start, over all operations."""
        entries = self.by_op().values()
        return LedgerEntry(
            sum(e.sent_bytes for e in entries), sum(e.messages for e in entries), sum(e.waited_s for e in entries)
        )

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.by_op()
        self._entries.clear()

    def _event(self) -> torch.cuda.Event:
        try:
            return self._spare.pop()
        except IndexError:
            return torch.cuda.Event(enable_timing=True)

    def _advance(self) -> None:
        """Book the waits that the device has left behind, and note whether it is in the next one."""
        while self._queued and self._queued[0].after.query():
            wait = self._queued.popleft()
            self._entries[wait.op].waited_s += wait.before.elapsed_time(wait.after) / 1000
            self._spare += [wait.before, wait.after]
            self.completed += 1
            self._device = LedgerPosition(wait.op, False, time.monotonic())
        if self._queued and not self._device.waiting and self._queued[0].before.query():
            self._device = LedgerPosition(self._queued[0].op, True, time.monotonic())
