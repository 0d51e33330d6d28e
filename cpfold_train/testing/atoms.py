"""Made-up atoms of the two complexes of :mod:`cpfold_train.testing.parity`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.parity import ATOMS, LENGTHS, TOTALS, cut_features


def atom_features(grid: Grid) -> dict[str, Any]:
    """Features of a rank's atoms, in fp64."""
    draw = torch.Generator().manual_seed(17)
    b, a = len(ATOMS), max(TOTALS)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (b, a, *shape), generator=draw)

    owner = torch.zeros(b, a, dtype=torch.int32)
    for i, counts in enumerate(ATOMS):
        owner[i, : TOTALS[i]] = torch.repeat_interleave(torch.tensor(counts))
    whole = {
        "ref_pos": torch.randn(b, a, 3, generator=draw, dtype=torch.float64),
        "ref_charge": integers(3).double() - 1,
        "ref_element": integers(128).byte(),
        "ref_atom_name_chars": integers(64, 4).byte(),
        # Several tokens a residue, as in ligands.
        "ref_space_uid": owner // 2,
        "atom_to_token": owner,
        "atom_pad_mask": torch.stack([torch.arange(a) < total for total in TOTALS]).double(),
    }
    feats = cut_features(whole, grid)
    n = grid.pad_tokens(max(LENGTHS))
    starts = [torch.tensor([0, *counts]).cumsum(0) for counts in ATOMS]
    padded = [torch.cat([start, start[-1:].expand(n + 1 - len(start))]) for start in starts]
    start = torch.stack(padded).int()
    return {**feats, "token_atom_start": start.numpy(), "atoms_per_token": start.diff(dim=1)}
