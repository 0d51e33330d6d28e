"""How long steps take on the device, without making the host wait for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time between :meth:`start` and :meth:`stop`.

    On CUDA the host only launches kernels and runs ahead of them, so its own clock would show how long launching took.
    There two events are recorded on the current stream, and read once the device has passed them.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a stretch of work."""
        self._read(wait=False)
        self._started = self._record() if self._cuda else time.perf_counter()

    def stop(self) -> None:
        """End it."""
        if self._cuda:
            self._pairs.append((self._started, self._record()))
        else:
            self._seconds += time.perf_counter() - self._started

    def seconds(self) -> float:
        """The total so far; waits for the device."""
        self._read(wait=True)
        return self._seconds

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, wait: bool) -> None:
        while self._pairs and (wait or self._pairs[0][1].query()):
            started, ended = self._pairs.pop(0)
            ended.synchronize()
            self._seconds += started.elapsed_time(ended) / 1000
