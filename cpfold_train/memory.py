"""Memory of this process in MiB, of the GPU where there is one, else of the host; and how the host's is managed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

LARGE_BYTES = 5 << 20
"""Tensors from this size on are whole tiles, not blocks of rows (``kernels/by_rows.py``): they come and go once."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUPS, _GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def return_large_tensors() -> None:
    """Let the system have the memory of large tensors back when they are freed, and keep that of small ones for reuse.

    By default glibc keeps freed tensors of up to 32 MiB in a heap that fragments: with it, ranks held up to three times
    what they used. Without effect where the C library is another. Another size than ``LARGE_BYTES`` can be set in the
    environment variable ``MALLOC_MMAP_THRESHOLD_``, as a whole number.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", LARGE_BYTES)))
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 29)


def host_bytes_in_all() -> float:
    """Memory of this machine, or what the control group of this process may have of it (cgroups(7), version 2)."""
    least = psutil.virtual_memory().total
    with contextlib.suppress(OSError, StopIteration):
        groups = (line.partition("::")[2] for line in _GROUPS.read_text().splitlines() if line.startswith("0::"))
        own = _GROUP_ROOT / next(groups).strip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(_GROUP_ROOT) and (limit := group / "memory.max").exists():
                allowed = limit.read_text().strip()
                least = min(least, float("inf") if allowed == "max" else int(allowed))
    return least


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
