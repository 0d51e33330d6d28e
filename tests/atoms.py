"""The package's dense forms of atom features."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot


def dense(feats: dict[str, Any]) -> dict[str, Tensor]:
    """Atom features of all atoms as the package takes them."""
    real = feats["atom_pad_mask"].double()
    n = feats["token_atom_start"].shape[1] - 1
    return {
        "ref_pos": feats["ref_pos"].double(),
        "ref_charge": feats["ref_charge"].double(),
        "ref_element": one_hot(feats["ref_element"].long(), 128).double(),
        "ref_atom_name_chars": one_hot(feats["ref_atom_name_chars"].long(), 64).double(),
        "ref_space_uid": feats["ref_space_uid"].long(),
        "atom_pad_mask": real,
        "atom_to_token": one_hot(feats["atom_to_token"].long(), n).double() * real[..., None],
    }
