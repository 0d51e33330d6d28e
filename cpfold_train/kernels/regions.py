"""Parts of the model that exchange nothing and launch many small kernels, fused by ``torch.compile`` on demand.

A layer of the diffusion transformer is some forty launches of a few microseconds' work each, of atoms as of tokens. On
a GPU what they take is the host's time to launch them. With ``compile=true`` TorchInductor makes few kernels of each
region; what lies between regions, attention and exchange, stays as it is. Regions are functions of tensors, with
weights among their arguments, so that all layers share one compiled function. A shape that was not there before is
compiled again, so crops are best padded to few sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch

from cpfold_train.kernels.linear import is_replaced

P = ParamSpec("P")
R = TypeVar("R")

Compiler = Callable[[Callable], Callable]
"""Makes of a region what runs instead of it."""

REGIONS: dict[str, Callable] = {}
"""The functions as they are written, by name."""
_compiler: Compiler | None = None


def compile_regions(compiler: Compiler | None) -> None:
    """Choose for this process what compiles regions; None runs them as they are."""
    global _compiler
    _compiler = compiler


def compiled_by(backend: str) -> Compiler:
    """``torch.compile`` with one of its backends."""
    return partial(torch.compile, backend=backend, fullgraph=True)


def region(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors as a region. It must be one graph: no exchange, no value that the host looks at."""
    compiler, compiled = None, function

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiler, compiled
        if torch.compiler.is_compiling() or is_replaced():
            # A part of another region; or what computes linear layers instead, which is not ours to compile.
            return function(*args, **kwargs)
        if compiler is not _compiler:
            compiler, compiled = _compiler, function if _compiler is None else _compiler(function)
        return compiled(*args, **kwargs)

    REGIONS[function.__qualname__] = function
    return run
