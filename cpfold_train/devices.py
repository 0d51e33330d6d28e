"""What GPUs have: the numbers that a plan is made with, from the vendor's data sheets, or measured on one.

Gigabytes are 10^9 bytes, as the data sheets count. Peaks are dense, without sparsity. Bandwidths of links are those of
one direction, half of what the data sheets call the total.

``device=FILE.json`` takes what ``gpu-check`` has measured: a JSON object whose ``device`` has the entries of
:class:`Measured` and whose ``rates`` those of :class:`Rates`. Whatever else it holds is not regarded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil

from cpfold_train.errors import ConfigError
from cpfold_train.kernels.choice import Choice, capability_of, choose_kernels
from cpfold_train.memory import host_bytes_in_all

GB, TERA = 10**9, 10**12
EXPS_A_CLOCK = 16
"""Exponentials of a multiprocessor from compute capability 8.0 to 10.0 (CUDA C++ Programming Guide, throughput of
native arithmetic instructions; for Hopper and Blackwell also Zadouri et al., "FlashAttention-4", 2026)."""
L2_BYTES_A_CLOCK = 35
"""Bytes that a multiprocessor reads from L2 at the most, by what others measured (gpu-l2-cache of Ernst,
github.com/te42kyfo/gpu-benches: data of 20 to 30 MB at 5.4 TB/s on an A100 SXM, 6.9 on an H100 PCIe and 9.7 on an
H200, over multiprocessors and the highest clock)."""


@dataclass(frozen=True)
class Rates:
    """What kernels and links reach; None where it is not known. In the file, all but None are numbers above 0.

    Attributes:
        bf16_flops, fp32_flops, tf32_flops: operations a second of large matrix products.
        memory_bytes_s: reads and writes of the device's memory.
        exp_s: exponentials a second.
        link_bytes_s: to another GPU of the machine, in one direction.
        launch_s: seconds that the host takes to launch a small kernel.
    """

    bf16_flops: float | None = None
    fp32_flops: float | None = None
    tf32_flops: float | None = None
    memory_bytes_s: float | None = None
    exp_s: float | None = None
    link_bytes_s: float | None = None
    launch_s: float | None = None


@dataclass(frozen=True)
class Measured:
    """Which GPU it was.

    Attributes:
        name: as the driver calls it.
        memory_bytes: all of its memory.
        capability: compute capability, as [9, 0].
    """

    name: str
    memory_bytes: int
    capability: list[int]


@dataclass(frozen=True)
class Device:
    """One GPU and its place in a machine; bytes, bytes a second and operations a second.

    Attributes:
        memory: what it holds.
        bandwidth: of its memory.
        bf16, tf32, fp32: peaks of matrix products.
        exps: peak of exponentials: 16 a clock of each multiprocessor.
        l2: what reading from its L2 cache reaches.
        link: to the other GPUs of its machine.
        network: of each GPU to other machines.
        host_link: to the memory of the host.
        host_memory: of a machine, for all its GPUs.
        per_node: GPUs of a machine.
        capability: compute capability; None of a CPU.
        source: where the numbers are from.
        measured: what was measured on it.
    """

    memory: float
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float
    exps: float
    l2: float
    link: float
    network: float
    host_link: float
    host_memory: float
    per_node: int
    capability: tuple[int, int] | None
    source: str
    measured: Rates = Rates()


def _exps(multiprocessors: int, clock: float) -> float:
    return EXPS_A_CLOCK * multiprocessors * clock


def _l2(multiprocessors: int, clock: float) -> float:
    return L2_BYTES_A_CLOCK * multiprocessors * clock


DEVICES = {
    "h100-80gb": Device(
        80 * GB, 3350 * GB, 989 * TERA, 494 * TERA, 67 * TERA, _exps(132, 1.7e9), _l2(132, 1.7e9),
        450 * GB, 50 * GB, 64 * GB, 2000 * GB, 8, (9, 0),
        "NVIDIA H100 Tensor Core GPU data sheet (SXM); DGX H100 data sheet: 8 x 400 Gb/s; 132 multiprocessors (H100 "
        "architecture whitepaper), 1.7 GHz under load are assumed",
    ),
    "h200-141gb": Device(
        141 * GB, 4800 * GB, 989 * TERA, 494 * TERA, 67 * TERA, _exps(132, 1.7e9), _l2(132, 1.7e9),
        450 * GB, 50 * GB, 64 * GB, 2000 * GB, 8, (9, 0),
        "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet: 8 x 400 Gb/s; multiprocessors and clock of "
        "the H100",
    ),
    "b200-180gb": Device(
        180 * GB, 8000 * GB, 2250 * TERA, 1125 * TERA, 75 * TERA, _exps(148, 1.85e9), _l2(148, 1.85e9),
        900 * GB, 50 * GB, 64 * GB, 2000 * GB, 8, (10, 0),
        "NVIDIA Blackwell architecture brief (HGX B200); DGX B200 data sheet: 1,440 GB of 8 GPUs, 8 x 400 Gb/s; 148 "
        "multiprocessors at 1.85 GHz (FlashAttention-4); L2 of each as fast as an H100's is assumed",
    ),
    "a100-80gb": Device(
        80 * GB, 2039 * GB, 312 * TERA, 156 * TERA, 19.5 * TERA, _exps(108, 1.41e9), _l2(108, 1.41e9),
        300 * GB, 25 * GB, 32 * GB, 2000 * GB, 8, (8, 0),
        "NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB); DGX A100 data sheet: 8 x 200 Gb/s; 108 multiprocessors "
        "at 1.41 GHz (A100 architecture whitepaper)",
    ),
    "a100-40gb": Device(
        40 * GB, 1555 * GB, 312 * TERA, 156 * TERA, 19.5 * TERA, _exps(108, 1.41e9), _l2(108, 1.41e9),
        300 * GB, 25 * GB, 32 * GB, 1000 * GB, 8, (8, 0),
        "NVIDIA A100 Tensor Core GPU data sheet (SXM, 40 GB); DGX A100 data sheet: 8 x 200 Gb/s; 108 multiprocessors "
        "at 1.41 GHz (A100 architecture whitepaper)",
    ),
    "l40s": Device(
        48 * GB, 864 * GB, 362 * TERA, 183 * TERA, 91.6 * TERA, _exps(142, 2.52e9), 5200 * GB,
        32 * GB, 25 * GB, 32 * GB, 1000 * GB, 8, (8, 9),
        "NVIDIA L40S data sheet: PCIe 4.0, no NVLink; 200 Gb/s a GPU and 1 TB of the host are assumed; 142 "
        "multiprocessors at 2.52 GHz; L2 as gpu-l2-cache (github.com/te42kyfo/gpu-benches) measured on an L40",
    ),
}  # fmt: skip
"""By the name that ``device`` takes, beside ``cpu``, ``gpu`` and a file."""
UNKNOWN = "h100-80gb"
"""Whose data a GPU gets that is not in the table."""


def find_device(name: str, local_ranks: int) -> Device:
    """A device by name; ``cpu`` is a rank's part of this machine, ``gpu`` its first GPU, and a name that ends with
    ``.json`` a file of what was measured on one.

    Raises:
        ConfigError: there is none of this name.
    """
    if name == "gpu":
        return _own_gpu()
    if name == "cpu":
        # A core's order of magnitude: times on CPU are no more than that.
        memory = psutil.virtual_memory().total / local_ranks
        rates = 10 * GB, 5e10, 5e10, 5e10, 5e8, 50 * GB, 2 * GB, 1 * GB, 10 * GB
        return Device(
            memory, *rates, local_ranks * memory, local_ranks, None, "this machine's memory", Rates(launch_s=0.0)
        )
    if name.endswith(".json"):
        return _measured(Path(name))
    if name not in DEVICES:
        known = " or ".join(f"device={known}" for known in (*DEVICES, "cpu"))
        raise ConfigError(f"device={name} is not known: type {known}")
    return DEVICES[name]


def kernels_on(device: Device, name: str, kernels: str, precision: str) -> Choice:
    """What computes on a device where ``kernels`` are asked for. Only of this machine's GPU it is asked what is
    installed: another one is taken to have it all.

    Args:
        device: that ``name`` stands for.
        name: as :func:`find_device` takes it.
        kernels: of :data:`cpfold_train.kernels.choice.KERNELS`.
        precision: ``trainer.precision``.
    """
    kind = "cpu" if device.capability is None else "cuda"
    installed = None if name == "gpu" else lambda _: True
    return choose_kernels(kernels, kind, precision, device.capability, installed)


def _own_gpu() -> Device:
    """This machine's GPU: its memory and the host's, and the speed of the one in the table that is called alike, or
    else an H100's."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("device=gpu finds no GPU here: type device=cpu, or the name of a GPU as device=h100-80gb")
    own = torch.cuda.get_device_properties(0)
    like = called_alike(own.name) or UNKNOWN
    return replace(
        DEVICES[like],
        memory=own.total_memory,
        host_memory=host_bytes_in_all(),
        capability=capability_of(torch.device("cuda", 0)),
        source=f"memory as the driver says, speed of {like}",
    )


def called_alike(name: str) -> str | None:
    """The device of the table that a driver's name says, whatever its memory; None where there is none."""
    return next((known for known in DEVICES if known.partition("-")[0] in name.lower()), None)


def own_gpu_name() -> str | None:
    """What the driver calls this machine's first GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _measured(file: Path) -> Device:
    """The device that a file describes, with the links to the host and to other machines of the one called alike.

    Raises:
        ConfigError: the file cannot be read, or is none of ``gpu-check``.
    """
    how = "type a file that python -m cpfold_train gpu-check has written, or the name of a GPU as device=h100-80gb"
    try:
        found = json.loads(file.read_text())
        gpu = Measured(**{field.name: found["device"].get(field.name) for field in fields(Measured)})
        rates = Rates(**{field.name: found["rates"].get(field.name) for field in fields(Rates)})
    except OSError as error:
        raise ConfigError(f"device={file} cannot be read ({error.strerror}): {how}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"device={file} is no JSON object with device and rates: {how}") from None
    for name, value in (vars(gpu) | vars(rates)).items():
        if not ((value is None and name in vars(rates)) or _is_right(name, value)):
            raise ConfigError(f"device={file} has {name}: {json.dumps(value)}, which cannot be: {how}")
    like = DEVICES[called_alike(gpu.name) or UNKNOWN]
    return replace(
        like,
        memory=gpu.memory_bytes,
        # A CPU has none: zeros in the file.
        capability=(gpu.capability[0], gpu.capability[1]) if any(gpu.capability) else None,
        source=f"measured on {gpu.name}; what was not, and links to the host and other machines: {like.source}",
        measured=rates,
    )


def _is_right(name: str, value: object) -> bool:
    if name == "name":
        return isinstance(value, str)
    if name == "capability":
        return isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
