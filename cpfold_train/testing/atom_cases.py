"""Ops of atoms on two made-up complexes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cpfold_train.model.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.ops.window_attention import windows_of_keys, with_halo
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.testing.atoms import atom_features
from cpfold_train.testing.parity import LENGTHS, TOTALS, Case, placed, random, to_device
from cpfold_train.testing.trunk_cases import Inputs, double

TOKEN_S, TOKEN_Z, M = 6, 5, 2
RECOMPUTED, KEPT = MemoryConfig(), MemoryConfig(recompute=False)
CONFIG = AtomConfig(8, 4, 2, 2, 1, 2)
B, N, A = len(LENGTHS), max(LENGTHS), max(TOTALS)
INPUTS = {
    "ref_pos": (random(B, A, 3, seed=1), "atom"),
    "s_trunk": (random(B, N, TOKEN_S, seed=2), "token"),
    "z": (random(B, N, N, TOKEN_Z, seed=3), "pair"),
    "q": (random(B, A, 8, seed=4), "atom"),
    "c": (random(B, A, 8, seed=5), "atom"),
    "bias": (random(B, A // 32 + 1, 32, 128, 4, seed=6), "window"),
    "r": (random(B * M, A, 3, seed=7), "atom"),
    "a": (random(B * M, N, 2 * TOKEN_S, seed=8), "shard"),
    "q_of_all": (random(B * M, A, 8, seed=9), "atom"),
    "c_of_all": (random(B * M, A, 8, seed=10), "atom"),
}


def features(cp: ContextParallel) -> Inputs:
    """Those of this rank's atoms, on the grid's device."""
    return to_device(atom_features(cp.grid), cp.mesh.device_type)


def encoded(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """Atoms, and the sum of each atom's pairs with real keys, each key weighted in its own way."""
    feats = {**features(cp), "ref_pos": x["ref_pos"]}
    q, c, p = module(feats, cp, x.get("s_trunk"), x.get("z"))
    keys = windows_of_keys(with_halo(feats["atom_pad_mask"], cp))[:, :, None, :, None]
    summed = (p * keys * random(128, 1, seed=0).to(p.device)).sum(3)
    return torch.cat([q, c, summed.flatten(1, 2)], -1)


def attended(module: nn.Module, x: Inputs, cp: ContextParallel, which: int) -> Tensor:
    """Tokens or atoms of the encoder's transformer."""
    return module(features(cp), x["q"], x["c"], x["bias"], cp, x.get("r"), M)[which]


def decoded(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """Moves of the atoms."""
    return module(x["a"], x["q_of_all"], x["c_of_all"], x["bias"][..., :2], features(cp), cp)


def _case(build, call, names: tuple[str, ...], out_placement: str) -> Case:
    return Case(build, call, *placed(INPUTS, names), out_placement)


ATOM = {
    "atom encoder": _case(partial(double, AtomEncoder, CONFIG, TOKEN_S, TOKEN_Z, False), encoded, ("ref_pos",), "atom"),
    "atom encoder with s and z": _case(
        partial(double, AtomEncoder, CONFIG, TOKEN_S, TOKEN_Z, True), encoded, ("ref_pos", "s_trunk", "z"), "atom"),
    "atoms to tokens": _case(
        partial(double, AtomAttentionEncoder, CONFIG, TOKEN_S, True, RECOMPUTED), partial(attended, which=0),
        ("q", "c", "bias", "r"), "shard"),
    "atoms to atoms": _case(
        partial(double, AtomAttentionEncoder, CONFIG, TOKEN_S, False, KEPT), partial(attended, which=1),
        ("q", "c", "bias"), "atom"),
    "decoder": _case(
        partial(double, AtomAttentionDecoder, CONFIG, TOKEN_S, KEPT), decoded, ("a", "q_of_all", "c_of_all", "bias"),
        "atom"),
}  # fmt: skip
