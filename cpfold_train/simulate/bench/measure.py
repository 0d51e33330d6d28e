"""Wall time, CPU time and peak memory of a repeated step, in this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cpfold_train.memory import now_mib, peak_mib, reset_peak


@dataclass
class Measurement:
    """Medians over the repeats, and the peak above the baseline before the first step.

    Attributes:
        wall_s: seconds a step.
        cpu_s: user and system seconds of this process a step.
        peak_mib: highest memory during the steps above what the process held before them.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float


def measure(step: Callable[[], None], repeats: int, device: torch.device, barrier: Callable[[], None]) -> Measurement:
    """Run ``step`` once to warm up and ``repeats`` times to measure.

    On CPU the peak is the kernel's high-water mark of resident memory, on CUDA the allocator's.
    """
    gc.collect()
    if device.type == "cpu":
        # Memory that malloc keeps for later would count as held before the step and hide its use.
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak(device)
    before = now_mib(device)
    step()
    _wait(device)
    walls, cpus = [], []
    for _ in range(repeats):
        barrier()
        wall, cpu = time.perf_counter(), _cpu_seconds()
        step()
        _wait(device)
        barrier()
        walls.append(time.perf_counter() - wall)
        cpus.append(_cpu_seconds() - cpu)
    return Measurement(statistics.median(walls), statistics.median(cpus), peak_mib(device) - before)


def _wait(device: torch.device) -> None:
    """For the device to have done what the host has posted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, str | int]:
    """What was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": cpu, "cores": os.cpu_count() or 1, "torch": torch.__version__, "system": platform.platform(), **gpu}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
