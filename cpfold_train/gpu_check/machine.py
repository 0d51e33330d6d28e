"""The machine and its packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.kernels.choice import capability_of, choose_kernels
from cpfold_train.simulate.bench.measure import machine

PACKAGES = (
    "lightning",
    "triton",
    "cuequivariance-torch",
    "cuequivariance-ops-torch-cu12",
    "cuequivariance-ops-torch-cu13",
    "transformer-engine",
    "boltz",
    "flash-attn",
)


def look(record: Record, scope: Scope) -> None:
    """Devices, versions, and the kernels that a run would choose."""
    device = torch.device(scope.device)
    if scope.device == "cuda" and not torch.cuda.is_available():
        record.fail("device", "torch finds no GPU here: type --device cpu, which runs the same phases small")
        return
    record.add("device", **described(device))
    record.add("host", memory_gib=round(psutil.virtual_memory().total / 2**30, 1), **machine())
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if scope.device == "cuda":
        versions |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    record.add("packages", **versions, **{name: found for name in PACKAGES if (found := _version(name))})
    choice = choose_kernels("auto", scope.device, "bf16-mixed", capability_of(device))
    record.add("kernels=auto", chosen=choice.name, because=choice.why)


def described(device: torch.device) -> dict[str, Any]:
    """A device as :mod:`cpfold_train.devices` reads it, and some more."""
    if device.type == "cpu":
        return {"name": "cpu", "memory_bytes": psutil.virtual_memory().total, "capability": [0, 0], "count": 1}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": [found.major, found.minor],
        "count": torch.cuda.device_count(),
        "multiprocessors": found.multi_processor_count,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
