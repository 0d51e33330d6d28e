"""What a case of the benchmark consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel.context import ContextParallel

Inputs = dict[str, Tensor]
ATOMS_PER_TOKEN = 8.2
"""Of a protein with its ligands, hydrogens aside."""


@dataclass(frozen=True)
class BenchCase:
    """One op: how to build it, which inputs with gradients it takes and how it is called."""

    build: Callable[[ModelConfig], nn.Module]
    inputs: tuple[str, ...]
    call: Callable[[nn.Module, Inputs, ContextParallel], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """How large an input is, padded for the grid: tokens, MSA sequences, atoms, and diffusion samples."""

    n: int
    msa_depth: int
    atoms: int
    samples: int
