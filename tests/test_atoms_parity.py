"""What concerns atoms gives the same on any grid as on 1x1, forward and backward, in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cpfold_train.model.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.ops import atom_tokens, window_attention
from cpfold_train.ops.window_attention import windows_of_keys, with_halo
from cpfold_train.parallel.grid import Grid
from tests.atoms import atom_features
from tests.parity import LENGTHS, TOTALS, check

TOKEN_S, TOKEN_Z, M = 6, 5, 2
RECOMPUTED, KEPT = MemoryConfig(), MemoryConfig(recompute=False)
CONFIG = AtomConfig(8, 4, 2, 2, 1, 2)
B, N, A = len(LENGTHS), max(LENGTHS), max(TOTALS)
GRIDS = [(1, 2), (2, 3), (3, 3)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = {
    "ref_pos": (random(B, A, 3, seed=1), "atom"),
    "s_trunk": (random(B, N, TOKEN_S, seed=2), "token"),
    "z": (random(B, N, N, TOKEN_Z, seed=3), "pair"),
    "q": (random(B, A, 8, seed=4), "atom"),
    "c": (random(B, A, 8, seed=5), "atom"),
    "bias": (random(B, A // 32 + 1, 32, 128, 4, seed=6), "window"),
    "r": (random(B * M, A, 3, seed=7), "atom"),
    "a": (random(B * M, N, 2 * TOKEN_S, seed=8), "share"),
    "q_of_all": (random(B * M, A, 8, seed=9), "atom"),
    "c_of_all": (random(B * M, A, 8, seed=10), "atom"),
}


def encoded(module, x, cp):
    """Atoms, and the sum of each atom's pairs with real keys, each key weighted in its own way."""
    feats = {**atom_features(cp.grid), "ref_pos": x["ref_pos"]}
    q, c, p = module(feats, cp, x.get("s_trunk"), x.get("z"))
    keys = windows_of_keys(with_halo(feats["atom_pad_mask"], cp))[:, :, None, :, None]
    summed = (p * keys * random(128, 1, seed=0)).sum(3)
    return torch.cat([q, c, summed.flatten(1, 2)], -1)


def encoded_tokens(module, x, cp):
    small_blocks()
    return module(atom_features(cp.grid), x["q"], x["c"], x["bias"], cp, x.get("r"), M)[0]


def encoded_atoms(module, x, cp):
    return module(atom_features(cp.grid), x["q"], x["c"], x["bias"], cp, x.get("r"), M)[1]


def decoded(module, x, cp):
    small_blocks()
    bias = x["bias"][..., :2]
    return module(x["a"], x["q_of_all"], x["c_of_all"], bias, atom_features(cp.grid), cp)


def small_blocks():
    """Two windows, and seven atoms, at a time."""
    window_attention.rows_per_block = lambda *_: 2
    atom_tokens.rows_per_block = lambda *_: 7


def double(cls, *args):
    return cls(*args).double()


CASES = {
    "atom encoder": (partial(double, AtomEncoder, CONFIG, TOKEN_S, TOKEN_Z, False), encoded, ["ref_pos"], "atom"),
    "atom encoder with s and z": (
        partial(double, AtomEncoder, CONFIG, TOKEN_S, TOKEN_Z, True), encoded, ["ref_pos", "s_trunk", "z"], "atom"),
    "atoms to tokens": (
        partial(double, AtomAttentionEncoder, CONFIG, TOKEN_S, True, RECOMPUTED), encoded_tokens,
        ["q", "c", "bias", "r"],
        "share"),
    "atoms to atoms": (
        partial(double, AtomAttentionEncoder, CONFIG, TOKEN_S, False, KEPT), encoded_atoms, ["q", "c", "bias"],
        "atom"),
    "decoder": (
        partial(double, AtomAttentionDecoder, CONFIG, TOKEN_S, KEPT), decoded, ["a", "q_of_all", "c_of_all", "bias"],
        "atom"),
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("case", CASES)
def test_grid_parity(ranks, case, grid):
    build, call, names, out_placement = CASES[case]
    inputs = {name: INPUTS[name][0] for name in names}
    placements = {name: INPUTS[name][1] for name in names}
    check(ranks, *grid, build, call, inputs, placements, out_placement)


def spans(cp, halo):
    return atom_tokens.token_spans(atom_features(cp.grid), cp, halo), cp.ledger.total().sent_bytes


@pytest.mark.parametrize("halo", [0, 48])
def test_spans_hold_the_tokens_of_the_atoms(ranks, halo):
    """Of both complexes, and no more: all ranks know them without a word."""
    answers = ranks.run(spans, 2, 3, halo)
    assert len({found for found, _ in answers}) == 1 and not any(sent for _, sent in answers)
    feats = atom_features(Grid())
    real = feats["atom_pad_mask"] == 1
    size = Grid(2, 3).pad_atoms(A) // 6
    for rank, (first, stop) in enumerate(answers[0][0]):
        own = slice(max(0, rank * size - halo), (rank + 1) * size + halo)
        tokens = feats["atom_to_token"][:, own][real[:, own]].tolist()
        assert (first, stop) == ((min(tokens), max(tokens) + 1) if tokens else (0, 1))
