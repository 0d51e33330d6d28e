"""How long a call takes: between two events on CUDA, after a call that warms up and a wait for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median of several calls.

    On CUDA it is the time on the device's stream, of a call that the host has posted without waiting for the one before
    it; where the host is slower than the device, it is the host's time.
    """
    call()
    if device != "cuda":
        return statistics.median(_on_host(call) for _ in range(repeats))
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in pairs)


def _on_host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
