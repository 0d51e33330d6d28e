"""Diffusion on two made-up complexes: conditioning, and a training step of the structure module."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cpfold_train.model.config import AtomConfig, DiffusionConfig, MemoryConfig
from cpfold_train.model.diffusion_conditioning import DiffusionConditioning, PairwiseConditioning
from cpfold_train.model.edm import AtomDiffusion
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.atoms import atom_features
from cpfold_train.testing.parity import LENGTHS, TOTALS, Case, placed, random, to_device
from cpfold_train.testing.trunk_cases import Inputs

TOKEN_S, TOKEN_Z, M = 6, 5, 3
ATOMS = AtomConfig(8, 4, 1, 2, 1, 2)
CONFIG = DiffusionConfig(
    token_transformer_depth=2, token_transformer_heads=2, conditioning_transition_layers=2, dim_fourier=8
)
RECOMPUTED = MemoryConfig()
B, N, A = len(LENGTHS), max(LENGTHS), max(TOTALS)
INPUTS = {
    "s_inputs": (random(B, N, TOKEN_S, seed=1), "token"),
    "s_trunk": (random(B, N, TOKEN_S, seed=2), "token"),
    "z": (random(B, N, N, TOKEN_Z, seed=3), "pair"),
    "rel_pos": (random(B, N, N, TOKEN_Z, seed=4), "pair"),
    "coords": (random(B, A, 3, seed=5) * 10 + 30, "atom"),
}


class Diffusion(nn.Module):
    """Conditioning and structure module, under the names that they have in a checkpoint."""

    def __init__(self, memory: MemoryConfig) -> None:
        super().__init__()
        self.diffusion_conditioning = DiffusionConditioning(TOKEN_S, TOKEN_Z, ATOMS, CONFIG)
        self.structure_module = AtomDiffusion(TOKEN_S, ATOMS, CONFIG, memory)


def diffusion(memory: MemoryConfig = RECOMPUTED) -> Diffusion:
    """Both in fp64."""
    return Diffusion(memory).double()


def features(grid: Grid, coords: Tensor) -> Inputs:
    """Those of a rank, on the device of ``coords``, which are its own."""
    n = grid.pad_tokens(N)
    mask = torch.stack([torch.arange(n) < length for length in LENGTHS]).double()
    return to_device({**atom_features(grid), "token_pad_mask": mask}, coords.device) | {"coords": coords}


def pairwise() -> PairwiseConditioning:
    """The conditioning of pairs in fp64."""
    return PairwiseConditioning(TOKEN_Z, 2).double()


def draws(device: torch.device | str = "cpu") -> RandomStreams:
    """Keys of the two complexes."""
    return RandomStreams(torch.arange(B, device=device) + 5)


def trained(module: nn.Module, x: Inputs, cp: ContextParallel, name: str = "denoised_atom_coords") -> Tensor:
    """What a training step of the structure module gives under a name."""
    feats = features(cp.grid, x["coords"])
    conditioning = module.diffusion_conditioning(x["s_trunk"], x["z"], x["rel_pos"], feats, cp)
    own = draws(x["coords"].device)
    return module.structure_module(x["s_inputs"], x["s_trunk"], feats, conditioning, M, own, cp)[name]


def conditioned(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """The conditioning of pairs."""
    return module(x["z"], x["rel_pos"])


def _case(build, call, names: tuple[str, ...], out_placement: str, tolerance: float) -> Case:
    return Case(build, call, *placed(INPUTS, names), out_placement, tolerance)


DIFFUSION = {
    "pair conditioning": _case(pairwise, conditioned, ("z", "rel_pos"), "pair", 1e-9),
    "diffusion, recomputed": _case(diffusion, trained, tuple(INPUTS), "atom", 1e-5),
    "diffusion, kept": _case(partial(diffusion, MemoryConfig(recompute=False)), trained, tuple(INPUTS), "atom", 1e-5),
}
