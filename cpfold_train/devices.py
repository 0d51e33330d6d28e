"""What GPUs have: the figures that a plan is made with, from the vendor's data sheets.

Gigabytes are 10^9 bytes, as the data sheets count. Peaks are dense, without sparsity. Bandwidths of links are those of
one direction, half of what the data sheets call the total.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from cpfold_train.errors import ConfigError

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Device:
    """One GPU and its place in a machine; bytes, bytes a second and operations a second.

    Attributes:
        memory: what it holds.
        bandwidth: of its memory.
        bf16, fp32: peaks of matrix products.
        link: to the other GPUs of its machine.
        network: of each GPU to other machines.
        host_link: to the memory of the host.
        per_node: GPUs of a machine.
        source: where the figures are from.
    """

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float
    network: float
    host_link: float
    per_node: int
    source: str


DEVICES = {
    "h100-80gb": Device(
        80 * GB, 3350 * GB, 989 * TERA, 67 * TERA, 450 * GB, 50 * GB, 64 * GB, 8,
        "NVIDIA H100 Tensor Core GPU data sheet (SXM); DGX H100 data sheet: 8 x 400 Gb/s",
    ),
    "h200-141gb": Device(
        141 * GB, 4800 * GB, 989 * TERA, 67 * TERA, 450 * GB, 50 * GB, 64 * GB, 8,
        "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet: 8 x 400 Gb/s",
    ),
    "b200-180gb": Device(
        180 * GB, 8000 * GB, 2250 * TERA, 75 * TERA, 900 * GB, 50 * GB, 64 * GB, 8,
        "NVIDIA Blackwell architecture brief (HGX B200); DGX B200 data sheet: 1,440 GB of 8 GPUs, 8 x 400 Gb/s",
    ),
    "a100-80gb": Device(
        80 * GB, 2039 * GB, 312 * TERA, 19.5 * TERA, 300 * GB, 25 * GB, 32 * GB, 8,
        "NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB); DGX A100 data sheet: 8 x 200 Gb/s",
    ),
    "a100-40gb": Device(
        40 * GB, 1555 * GB, 312 * TERA, 19.5 * TERA, 300 * GB, 25 * GB, 32 * GB, 8,
        "NVIDIA A100 Tensor Core GPU data sheet (SXM, 40 GB); DGX A100 data sheet: 8 x 200 Gb/s",
    ),
    "l40s": Device(
        48 * GB, 864 * GB, 362 * TERA, 91.6 * TERA, 32 * GB, 25 * GB, 32 * GB, 8,
        "NVIDIA L40S data sheet: PCIe 4.0, no NVLink; 200 Gb/s a GPU are assumed",
    ),
}  # fmt: skip
"""By the name that ``device`` takes, beside ``cpu``."""


def find_device(name: str, local_ranks: int) -> Device:
    """A device by name; ``cpu`` is a rank's share of this machine, and ``gpu`` its first GPU.

    Raises:
        ConfigError: there is none of this name.
    """
    if name == "gpu":
        return _own_gpu()
    if name == "cpu":
        # A core's order of magnitude: times on CPU are no more than that.
        memory = psutil.virtual_memory().total / local_ranks
        return Device(memory, 10 * GB, 5e10, 5e10, 2 * GB, 1 * GB, 10 * GB, local_ranks, "this machine's memory")
    if name not in DEVICES:
        known = " or ".join(f"device={known}" for known in (*DEVICES, "cpu"))
        raise ConfigError(f"device={name} is not known: type {known}")
    return DEVICES[name]


def _own_gpu() -> Device:
    """This machine's GPU: its memory, and the speed of the one in the table that is called alike, or else an H100's."""
    import torch

    name = own_gpu_name()
    if name is None:
        raise ConfigError("device=gpu finds no GPU here: type device=cpu, or the name of a GPU as device=h100-80gb")
    memory = torch.cuda.get_device_properties(0).total_memory
    like = like_device(name) or "h100-80gb"
    return replace(DEVICES[like], memory=memory, source=f"memory as the driver says, speed of {like}")


def own_gpu_name() -> str | None:
    """What the driver calls this machine's first GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def like_device(name: str) -> str | None:
    """The entry of :data:`DEVICES` that is called as the driver calls a GPU, whatever its memory; None if none is."""
    return next((known for known in DEVICES if known.partition("-")[0] in name.lower()), None)
