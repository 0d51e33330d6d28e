"""The features of one sample for one rank's tile, under Boltz-2's names.

Token features are whole on every rank (N values); pair and MSA features exist only as the rank's tile, so that no rank
ever allocates N x N. N and S below are padded to the grid; padding is zero, and a gap in ``msa``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpfold_train.data import msa
from cpfold_train.data.alignment import Alignment
from cpfold_train.data.crop import crop_tokens
from cpfold_train.data.residues import TOKENS, method_id
from cpfold_train.data.structure import Structure
from cpfold_train.parallel.grid import Grid, Interval
from cpfold_train.parallel.random import key_of, numpy_generator

DISTO_BOUNDARIES = np.linspace(2.0, 22.0, 63, dtype=np.float32)
"""Angstrom between the bins of the distogram; bin 0 is everything nearer than the first."""
NUM_BINS = len(DISTO_BOUNDARIES) + 1

UNSPECIFIED = 0
"""Class of ``contact_conditioning``: nothing is said about any contact."""

PLACEMENTS = {
    "token_index": "replicate",
    "residue_index": "replicate",
    "asym_id": "replicate",
    "entity_id": "replicate",
    "sym_id": "replicate",
    "mol_type": "replicate",
    "method_feature": "replicate",
    "modified": "replicate",
    "token_pad_mask": "replicate",
    "token_disto_mask": "replicate",
    "cyclic_period": "replicate",
    "deletion_mean": "replicate",
    "res_type": "replicate",
    "profile": "replicate",
    "disto_center": "replicate",
    "sample_key": "replicate",
    "num_tokens": "replicate",
    "token_bonds": "tile",
    "type_bonds": "tile",
    "contact_conditioning": "tile",
    "contact_threshold": "tile",
    "disto_target": "tile",
    "msa": "tile",
    "msa_mask": "tile",
    "has_deletion": "tile",
    "deletion_value": "tile",
    "msa_paired": "tile",
}
"""How the ranks of a replica hold each batched feature: all the same, or as tiles of dims 1 (cp_row) and 2 (cp_col)."""


@dataclass(frozen=True)
class Crop:
    """A sample cut to size, before it is padded and tiled.

    Attributes:
        tokens: (n,) int64 tokens of the structure.
        rows: assembled and sampled MSA rows.
        sample_key: key of this draw, from which the model draws its own randomness.
    """

    structure: Structure
    tokens: np.ndarray
    rows: msa.Rows
    sample_key: int


def make_crop(
    structure: Structure,
    alignments: dict[int, Alignment],
    *,
    crop_size: int,
    max_msa_rows: int,
    crop: str = "spatial",
    interface: float = 0.5,
    draw: tuple[int, int, int],
) -> Crop:
    """Draw a crop and its MSA rows: a pure function of the sample and of ``draw``, (seed, epoch, position)."""
    seed, epoch, position = draw
    rng = numpy_generator(seed, "crop", epoch, position)
    tokens = crop_tokens(structure, crop_size, crop, interface, rng)
    rows = msa.assemble(structure, tokens, alignments, max_msa_rows, numpy_generator(seed, "msa", epoch, position))
    return Crop(structure, tokens, rows, key_of(seed, epoch, position))


def tile_features(crop: Crop, grid: Grid, n: int, s: int) -> dict[str, Any]:
    """Features of a crop for one rank.

    Args:
        n: padded number of tokens, a multiple of R * C.
        s: padded number of MSA rows, a multiple of R.

    Returns:
        Token features (n, ...), pair features (n / R, n / C, ...), MSA features (s / R, n / C), ``sample_key``,
        ``num_tokens`` and ``id``.
    """
    rows, columns = grid.row_tokens(n), grid.col_tokens(n)
    token = token_features(crop, n)
    return {
        **token,
        **pair_features(token["disto_center"], token["token_disto_mask"], rows, columns),
        **msa.tile(crop.rows, grid.msa_rows(s), columns),
        "sample_key": np.int64(crop.sample_key),
        "num_tokens": np.int64(len(crop.tokens)),
        "id": crop.structure.meta["id"],
    }


def token_features(crop: Crop, n: int) -> dict[str, np.ndarray]:
    """Features of all tokens of the crop, padded to ``n`` with zeros. ``disto_center`` (n, 3) is in Angstrom."""
    structure, tokens = crop.structure, crop.tokens
    asym_id = structure.asym_id[tokens].astype(np.int64)
    center, known = structure.disto_center
    profile, deletion_mean = msa.profile(crop.rows)
    features = {
        "token_index": np.arange(len(tokens)),
        "residue_index": structure.res_index[tokens].astype(np.int64),
        "asym_id": asym_id,
        "entity_id": structure.chains["entity"][asym_id],
        "sym_id": structure.chains["sym"][asym_id],
        "mol_type": structure.chains["mol_type"][asym_id],
        "method_feature": np.full(len(tokens), method_id(structure.meta["method"])),
        "modified": structure.modified[tokens].astype(np.int64),
        "token_pad_mask": np.ones(len(tokens), dtype=np.float32),
        "token_disto_mask": known[tokens].astype(np.float32),
        "cyclic_period": np.zeros(len(tokens), dtype=np.float32),
        "deletion_mean": deletion_mean,
        "res_type": np.eye(len(TOKENS), dtype=np.float32)[structure.res_type[tokens]],
        "profile": profile,
        "disto_center": center[tokens],
    }
    return {name: _pad(value, n) for name, value in features.items()}


def pair_features(center: np.ndarray, known: np.ndarray, rows: Interval, columns: Interval) -> dict[str, np.ndarray]:
    """Features of one tile of token pairs.

    Args:
        center: (n, 3) representative atoms in Angstrom.
        known: (n,) which of them are resolved.
        rows: tokens of the tile's rows.
        columns: tokens of its columns.

    Returns:
        ``token_bonds`` (n_r, n_c, 1) and ``contact_threshold`` float32, ``type_bonds`` and ``contact_conditioning``
        (classes, n_r, n_c) uint8, ``disto_target`` (n_r, n_c, K = 1) uint8 bins, 0 where unresolved. Bonds are those
        that the sequence does not imply, and polymers have none.
    """
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    first, second = center[slice(*rows)], center[slice(*columns)]
    # Component by component, so that an element is the same number whatever the tile's shape.
    square = sum((first[:, None, x] - second[None, :, x]) ** 2 for x in range(3))
    # The bin is the number of boundaries below the distance.
    target = np.searchsorted(DISTO_BOUNDARIES, np.sqrt(square), side="left")
    target[known[slice(*rows)] == 0] = 0
    target[:, known[slice(*columns)] == 0] = 0
    return {
        "token_bonds": np.zeros((*shape, 1), dtype=np.float32),
        "type_bonds": np.zeros(shape, dtype=np.uint8),
        "contact_conditioning": np.full(shape, UNSPECIFIED, dtype=np.uint8),
        "contact_threshold": np.zeros(shape, dtype=np.float32),
        "disto_target": target[..., None].astype(np.uint8),
    }


def _pad(value: np.ndarray, n: int) -> np.ndarray:
    padded = np.zeros((n, *value.shape[1:]), dtype=value.dtype)
    padded[: len(value)] = value
    return padded
