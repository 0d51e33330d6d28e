"""What concerns atoms gives the same on any grid as on 1x1, forward and backward, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpfold_train.ops import atom_tokens, window_attention
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.atom_cases import ATOM, A
from cpfold_train.testing.atoms import atom_features
from tests.parity import check_case

GRIDS = [(1, 2), (2, 3), (3, 1), pytest.param((3, 3), marks=pytest.mark.slow)]


class InSmallBlocks:
    """Two windows, and seven atoms, at a time."""

    def __init__(self, call):
        self.call = call

    def __call__(self, module, x, cp):
        window_attention.rows_per_block = lambda *_: 2
        atom_tokens.rows_per_block = lambda *_: 7
        return self.call(module, x, cp)


IN_BLOCKS = ("atoms to tokens", "decoder")
CASES = ATOM | {name: replace(ATOM[name], call=InSmallBlocks(ATOM[name].call)) for name in IN_BLOCKS}


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("case", CASES)
def test_grid_parity(ranks, case, grid):
    check_case(ranks, *grid, CASES[case])


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
