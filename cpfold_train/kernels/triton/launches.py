"""How kernels are launched in a typical case, so that they can be compiled and inspected without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel, its argument types and its compile-time constants.

    Attributes:
        name: of the kernel and the case.
        kernel: what ``triton.jit`` made.
        types: Triton's type of each argument that is no constant: ``*bf16``, ``*fp32``, ``i32`` ...
        constants: values of ``tl.constexpr`` arguments.
        num_warps, num_stages: of the launch.
        major: the major compute capability that the launch is for; None for all.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    major: int | None = None
