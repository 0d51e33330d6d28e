"""A device cuda:0 for tensors without contents, in a build of torch without CUDA.

``FakeTensorMode`` computes shapes on any device, but autograd and autocast ask the device for its guard, and Python for
events and streams. The guard is the little library of ``guard.cpp``; the rest is stood in for here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("guard.cpp")
TORCH = Path(importlib.util.find_spec("torch").origin).parent
COMPILER = "g++"
_operators: Any = None
"""Registers operators for as long as it lives."""


def compile_guard(folder: Path) -> Path:
    """The guard library, in a folder."""
    library, libraries = folder / "guard.so", TORCH / "lib"
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", str(SOURCE)]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def use(library: Path) -> None:
    """Let this process have the device to its end. It must not have imported torch yet, which looks for devices."""
    ctypes.CDLL(str(library))
    import torch

    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: torch.Stream(device="cuda")
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    global _operators
    _operators = torch.library.Library("aten", "IMPL", "Meta")
    _operators.impl("record_stream", lambda *_: None)
