"""A device that is not there: a stream which comes as far as a test lets it, and the events on it."""

from __future__ import annotations

import torch


class Stream:
    """Takes the place of ``torch.cuda.Event``; each millisecond the stream comes to the next event that was recorded.

    Attributes:
        made: events there are.
        synchronized: how often the host waited for one.
    """

    def __init__(self, monkeypatch) -> None:
        self.made = self.synchronized = self._recorded = self._reached = 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(self))

    def run_to(self, count: int) -> None:
        """Let the stream come to so many of the events recorded since the start, and no further."""
        self._reached = max(self._reached, count)


class _Event:
    def __init__(self, stream: Stream) -> None:
        stream.made += 1
        self._stream = stream

    def record(self) -> None:
        self._stream._recorded += 1
        self._at = self._stream._recorded

    def query(self) -> bool:
        return self._at <= self._stream._reached

    def synchronize(self) -> None:
        self._stream.synchronized += 1
        assert self.query(), "the test would wait for ever"

    def elapsed_time(self, other: _Event) -> float:
        assert self.query() and other.query()
        return float(other._at - self._at)
