"""Which kernels compute attention and the local parts of the pair stack: torch's, Triton's or cuEquivariance's."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

KERNELS = ("auto", "torch", "triton", "cuequivariance")
"""What ``kernels`` may be in a configuration. ``auto`` becomes one of the others once the device is known."""
PACKAGES = {"triton": "triton", "cuequivariance": "cuequivariance_torch"}
"""What each of them imports. Triton comes with CUDA builds of torch."""
INSTALL = {"triton": "pip install triton", "cuequivariance": "pip install -e '.[cuequivariance]'"}
"""What to type for them."""
BLACKWELL = (10, 0)
"""Compute capability from which on cuEquivariance has attention kernels of its own for the device."""


class Choice(NamedTuple):
    """``torch``, ``triton`` or ``cuequivariance``, and why, as the end of a sentence."""

    name: str
    why: str


def choose_kernels(
    asked: str,
    device_type: str,
    precision: str,
    capability: tuple[int, int] | None = None,
    installed: Callable[[str], bool] | None = None,
) -> Choice:
    """The best kernels that device, precision and installed packages allow, or those that were asked for.

    Args:
        asked: one of :data:`KERNELS`.
        device_type: ``cpu`` or ``cuda``.
        precision: ``trainer.precision``.
        capability: compute capability of the GPU.
        installed: whether the package of some kernels is there; None: :func:`is_installed`, on this machine.
    """
    installed = installed or is_installed
    if asked != "auto":
        return Choice(asked, "as asked for")
    if device_type != "cuda":
        return Choice("torch", "there is no GPU")
    if precision == "64-true":
        return Choice("torch", "the others have no fp64")
    if capability and capability >= BLACKWELL and precision != "32-true" and installed("cuequivariance"):
        return Choice("cuequivariance", "it has kernels for this GPU")
    if installed("triton"):
        return Choice("triton", "it is the fastest that is installed")
    return Choice("torch", "the triton package is not installed")


def is_installed(kernels: str) -> bool:
    """Whether the package of these kernels can be imported."""
    return kernels == "torch" or find_spec(PACKAGES[kernels]) is not None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for other devices."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
