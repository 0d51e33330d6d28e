"""Time by kernel of one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 16
"""Kernels that are told."""


def by_kernel(call: Callable[[], object], device: str) -> tuple[list[dict], int]:
    """The kernels that take longest, and how many are launched in all.

    Returns:
        For each of the former ``name``, ``count`` and ``ms``; on a CPU these are torch's operators.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, field))
    told = [
        {"name": event.key[:100], "count": event.count, "ms": getattr(event, field) / 1000} for event in events[:MOST]
    ]
    return told, sum(event.count for event in events)
