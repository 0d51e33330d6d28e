"""Memory of this process in MiB: of the GPU where there is one, else of the host."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now_mib(device: torch.device) -> float:
    """What is in use."""
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**20


def reset_peak(device: torch.device) -> None:
    """Start a new peak. On hosts other than Linux the peak is that of the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # proc(5): resets VmHWM to the present resident set


def peak_mib(device: torch.device) -> float:
    """The most that was in use since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        if peak := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
            return int(peak[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
