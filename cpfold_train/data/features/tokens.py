"""Features of the tokens of a crop, and of one tile of their pairs, under Boltz-2's names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cpfold_train.data.structures.residues import method_id
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Interval
from cpfold_train.vocabulary import BOND_TYPES, NUM_TOKENS

DISTO_BOUNDARIES = np.linspace(2.0, 22.0, 63, dtype=np.float32)
"""Angstrom between the bins of the distogram; bin 0 is everything nearer than the first."""
NUM_BINS = len(DISTO_BOUNDARIES) + 1

_BLOCK_ROWS = 64


def token_features(structure: Structure, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of each token, without its alignment.

    Args:
        tokens: (n,) tokens of the crop.

    Returns:
        ``token_index``, ``residue_index``, ``asym_id``, ``entity_id``, ``sym_id``, ``mol_type``, ``method_feature`` and
        ``modified`` (n,) int64; ``token_pad_mask``, ``token_resolved_mask``, ``token_disto_mask`` and ``cyclic_period``
        (residues of a cyclic chain, else 0) (n,) float32; ``res_type`` (n, 33) one-hot float32; ``disto_center`` (n, 3)
        in Angstrom, zero where unresolved.
    """
    asym_id = structure.asym_id[tokens].astype(np.int64)
    disto_center, disto_known = structure.disto_center
    return {
        "token_index": np.arange(len(tokens)),
        "residue_index": structure.res_index[tokens].astype(np.int64),
        "asym_id": asym_id,
        "entity_id": structure.chains["entity"][asym_id],
        "sym_id": structure.chains["sym"][asym_id],
        "mol_type": structure.chains["mol_type"][asym_id],
        "method_feature": np.full(len(tokens), method_id(structure.meta["method"])),
        "modified": structure.modified[tokens].astype(np.int64),
        "token_pad_mask": np.ones(len(tokens), dtype=np.float32),
        "token_resolved_mask": structure.center[1][tokens].astype(np.float32),
        "token_disto_mask": disto_known[tokens].astype(np.float32),
        "cyclic_period": _cyclic_periods(structure)[asym_id],
        "res_type": np.eye(NUM_TOKENS, dtype=np.float32)[structure.res_type[tokens]],
        "disto_center": disto_center[tokens],
    }


def as_in_boltz2(structure: Structure) -> Structure:
    """A structure with its modified residues as the package's parsers have them (``boltz/data/parse/mmcif.py``).

    The first atom of each is its center and its representative atom. Bonds with its neighbours in sequence are listed,
    as entries of the wwPDB list those between resolved atoms.
    """
    if not structure.modified.any():
        return structure
    center, disto = (np.where(structure.modified, 0, x) for x in (structure.center_atom, structure.disto_atom))
    links = _links_of_modified(structure)
    return replace(
        structure,
        center_atom=center,
        disto_atom=disto,
        bond_atoms=np.concatenate([structure.bond_atoms, links.astype(structure.bond_atoms.dtype)]),
        bond_type=np.append(structure.bond_type, np.full(len(links), BOND_TYPES.index("covalent"), np.uint8)),
    )


def _links_of_modified(structure: Structure) -> np.ndarray:
    """(K, 2) resolved atoms, C and N or O3' and P, that join a modified residue to the one before or after it."""
    names, token = structure.comp_atom_name[structure.ref_atom], structure.atom_token
    usable = structure.polymer[token] & structure.resolved
    found = np.full((4, len(structure)), -1)
    for row, name in enumerate((b"C", b"N", b"O3'", b"P")):
        atoms = np.flatnonzero(usable & (names == name))
        found[row, token[atoms]] = atoms
    modified, chain, position = structure.modified, structure.asym_id, structure.res_index
    joined = (chain[1:] == chain[:-1]) & (position[1:] == position[:-1] + 1) & (modified[1:] | modified[:-1])
    pairs = np.concatenate([np.stack([found[row, :-1], found[row + 1, 1:]], axis=1)[joined] for row in (0, 2)])
    return pairs[(pairs >= 0).all(axis=1)]


def _cyclic_periods(structure: Structure) -> np.ndarray:
    """(chains,) float32 residues of the chains whose first and last residue are bonded to each other, 0 of others."""
    asym_id, res_index = structure.asym_id, structure.res_index
    last = np.zeros(len(structure.meta["chains"]), dtype=np.int64)
    np.maximum.at(last, asym_id, res_index)
    first, second = structure.atom_token[structure.bond_atoms].T
    # A bond closes a chain if it joins its residue 0 to its last one, three residues at least.
    end = last[asym_id[first]]
    closed = (asym_id[first] == asym_id[second]) & (end >= 2)
    closed &= np.minimum(res_index[first], res_index[second]) == 0
    closed &= np.maximum(res_index[first], res_index[second]) == end
    periods = np.zeros(len(last), dtype=np.float32)
    periods[asym_id[first[closed]]] = end[closed] + 1
    return periods


def bond_tile(structure: Structure, tokens: np.ndarray, rows: Interval, columns: Interval) -> dict[str, np.ndarray]:
    """Which tokens of a tile are bonded: the bonds that a :class:`Structure` lists, those within a token included.

    Returns:
        ``token_bonds`` (n_r, n_c, 1) uint8, 1 where there is a bond, and ``type_bonds`` (n_r, n_c) uint8, 1 + the index
        into ``BOND_TYPES``, 0 where there is none.
    """
    position = np.full(len(structure), -1)
    position[tokens] = np.arange(len(tokens))
    pairs = position[structure.atom_token[structure.bond_atoms]]
    # Each bond one way and then the other, so that of several bonds between two tokens the last one counts both ways.
    both_ways = np.stack([pairs, pairs[:, ::-1]], axis=1).reshape(-1, 2)
    i, j = both_ways[:, 0], both_ways[:, 1]
    kept = (i >= rows[0]) & (i < rows[1]) & (j >= columns[0]) & (j < columns[1])
    kinds = np.zeros((rows[1] - rows[0], columns[1] - columns[0]), dtype=np.uint8)
    kinds[i[kept] - rows[0], j[kept] - columns[0]] = np.repeat(structure.bond_type, 2)[kept] + 1
    return {"token_bonds": (kinds > 0).astype(np.uint8)[..., None], "type_bonds": kinds}


def distogram_tile(center: np.ndarray, known: np.ndarray, rows: Interval, columns: Interval) -> np.ndarray:
    """Distance bins of a tile of token pairs.

    Args:
        center: (n, 3) representative atoms in Angstrom.
        known: (n,) which of them are resolved.

    Returns:
        ``disto_target`` (n_r, n_c, K = 1) uint8, 0 where unresolved; the package has it one-hot.
    """
    bins = np.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype=np.uint8)
    second = center[slice(*columns)]
    for start in range(0, len(bins), _BLOCK_ROWS):
        block = bins[start : start + _BLOCK_ROWS]
        first = center[rows[0] + start : rows[0] + start + len(block)]
        # Component by component, so that an element is the same number whatever the tile's shape.
        square = sum((first[:, None, x] - second[None, :, x]) ** 2 for x in range(3))
        # The bin is the number of boundaries below the distance.
        block[:] = np.searchsorted(DISTO_BOUNDARIES, np.sqrt(square), side="left")
    # What is unresolved has no distance; the loss masks it, and bin 0 is as good as any.
    bins[known[slice(*rows)] == 0] = 0
    bins[:, known[slice(*columns)] == 0] = 0
    return bins[..., None]
