"""Features of the atoms of a crop: one rank's part of them, under Boltz-2's names.

Where the package has one-hot vectors and A x N matrices, here are indices: ``ref_element`` (A,) for (A, 128),
``ref_atom_name_chars`` (A, 4) for (A, 4, 64), ``atom_to_token`` (A,) for (A, N).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Interval
from cpfold_train.spatial import rotation_rows
from cpfold_train.vocabulary import BOLTZ2, CORRECTED


class CropAtoms(NamedTuple):
    """Which atoms a crop of n tokens has.

    Attributes:
        atom: (A,) int64 atoms of the structure.
        start: (n + 1,) int64; token i of the crop owns atoms ``start[i]:start[i + 1]`` of the crop.
        token: (A,) int64 token of the crop that each belongs to.
        residue: (A,) int64 residue or ligand that each belongs to, counted through the crop.
    """

    atom: np.ndarray
    start: np.ndarray
    token: np.ndarray
    residue: np.ndarray


def crop_atoms(structure: Structure, tokens: np.ndarray) -> CropAtoms:
    """The atoms of ascending tokens, in their order."""
    first = structure.atom_start[tokens].astype(np.int64)
    count = structure.atom_start[tokens + 1] - first
    start = np.concatenate([[0], np.cumsum(count)])
    token = np.repeat(np.arange(len(tokens)), count)
    asym_id, res_index = structure.asym_id[tokens], structure.res_index[tokens]
    begins = (np.diff(asym_id, prepend=-1) != 0) | (np.diff(res_index, prepend=-1) != 0)
    residue = np.cumsum(begins) - 1
    return CropAtoms(np.arange(start[-1]) + (first - start[:-1])[token], start, token, residue[token])


def positions_of(structure: Structure, tokens: np.ndarray, atoms: CropAtoms, which: np.ndarray) -> np.ndarray:
    """Index among the crop's atoms of one atom of each token.

    Args:
        which: (L,) ``structure.disto_atom`` or ``structure.center_atom``.

    Returns:
        (n,) int32. A token without that atom gets its first one, which the masks of tokens mark as unresolved.
    """
    return (atoms.start[:-1] + np.maximum(which[tokens], 0)).astype(np.int32)


def atom_features(
    structure: Structure, atoms: CropAtoms, motions: np.ndarray, part: Interval, features: str = CORRECTED
) -> dict[str, np.ndarray]:
    """Features of the atoms in ``part``, which may reach past the last one.

    Args:
        motions: (residues, 7) normal deviates, from which each residue's conformer is turned and shifted.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.

    Returns:
        ``ref_pos`` (A, 3) in Angstrom, ``ref_charge``, ``atom_pad_mask``, ``atom_resolved_mask`` and ``bfactor`` (A,)
        float32; ``ref_element`` (A,) atomic number and ``ref_atom_name_chars`` (A, 4) code of the character less 32,
        uint8; ``ref_space_uid`` and ``atom_to_token`` (A,) int32; ``coords`` (A, 3) in Angstrom from the centre of the
        crop's resolved atoms (the one conformation of the package's (K, A, 3)). Unresolved ones are zero, or with
        ``boltz2`` minus that centre, from where they are noised like all others.
    """
    own = slice(*part)
    atom = atoms.atom[own]
    reference, resolved = structure.ref_atom[atom], structure.resolved[atom]
    characters = structure.comp_atom_name.view(np.uint8).reshape(-1, 4)[reference]
    known = atoms.atom[structure.resolved[atoms.atom]]
    middle = structure.coords[known].mean(axis=0, dtype=np.float64) if len(known) else 0.0
    placed = resolved | (features == BOLTZ2)
    return {
        "ref_pos": _moved_conformers(structure, atoms, motions, own, features),
        "ref_charge": structure.comp_charge[reference].astype(np.float32),
        "ref_element": structure.comp_element[reference],
        "ref_atom_name_chars": np.where(characters > 0, characters - 32, 0).astype(np.uint8),
        "ref_space_uid": atoms.residue[own].astype(np.int32),
        "atom_to_token": atoms.token[own].astype(np.int32),
        "atom_pad_mask": np.ones(len(atom), dtype=np.float32),
        "atom_resolved_mask": resolved.astype(np.float32),
        "coords": np.where(placed[:, None], structure.coords[atom] - middle, 0).astype(np.float32),
        "bfactor": structure.b_factor[atom],
    }


def _moved_conformers(
    structure: Structure, atoms: CropAtoms, motions: np.ndarray, own: slice, features: str
) -> np.ndarray:
    """Reference conformers, each centred on its atoms in the crop, rotated at random and shifted by N(0, 1) Angstrom.

    AlphaFold 3, supplement 2.8 and Algorithm 19. The mean is over all of the residue's atoms, as it is in inference.
    With ``boltz2`` it is over the resolved ones, or over all in a complex without any, which is one to predict; and the
    last residue of the crop, and those without a resolved atom, are left as they are.
    """
    pos, residue = structure.comp_pos[structure.ref_atom[atoms.atom]], atoms.residue
    known = np.ones(len(residue), bool)
    if features == BOLTZ2 and structure.resolved.any():
        known = structure.resolved[atoms.atom]
    count = np.bincount(residue, known)
    middle = np.stack([np.bincount(residue, pos[:, x] * known) for x in range(3)], axis=1)
    middle /= np.maximum(count, 1)[:, None]
    centred, rotation, shift = pos[own] - middle[residue[own]], rotation_matrices(motions[:, :4]), motions[:, 4:]
    # Component by component, so that an atom's number does not depend on which others the rank has.
    turned = sum(rotation[residue[own], :, x] * centred[:, x, None] for x in range(3))
    moved = turned + shift[residue[own]]
    if features == BOLTZ2:
        stays = (count == 0) | (np.arange(len(count)) == len(count) - 1)
        moved = np.where(stays[residue[own], None], pos[own], moved)
    return moved.astype(np.float32)


def rotation_matrices(quaternions: np.ndarray) -> np.ndarray:
    """(n, 4) quaternions of any length to (n, 3, 3) rotations; of normal deviates they are uniform."""
    unit = quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)
    return np.array(rotation_rows(*unit.T)).transpose(2, 0, 1)
