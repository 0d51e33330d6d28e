"""Three atoms of each token that span a local frame, for the confidence head's aligned error.

AlphaFold 3, supplement 4.3.2, as in ``boltz/data/feature/featurizerv2.py`` (``process_atom_features`` and
``compute_frames_nonpolymer``). There, and here with the features ``boltz2``, modified and unknown amino acids have no
frame, and an unresolved atom of a ligand has whatever a sort of infinite distances ends with.
"""

from __future__ import annotations

import numpy as np
import torch

from cpfold_train.data.features.atoms import CropAtoms
from cpfold_train.data.structures.structure import Structure
from cpfold_train.spatial import neighbours, spanning
from cpfold_train.vocabulary import BOLTZ2, CORRECTED, PROTEIN, UNKNOWN

BACKBONE = ((b"N", b"CA", b"C"), (b"C1'", b"C3'", b"C4'"))
"""Atoms of the frame of an amino acid and of a nucleotide; the second is the origin."""

_BLOCK_ATOMS = 256


def backbone_atoms(structure: Structure) -> np.ndarray:
    """(L, 3) int64 atoms that span the frame of each residue of a polymer, -1 where it has no such atom."""
    names, token = structure.comp_atom_name[structure.ref_atom], structure.atom_token
    protein = structure.chains["mol_type"][structure.asym_id] == PROTEIN
    found = np.full((2, 3, len(structure)), -1)
    for kind, triple in enumerate(BACKBONE):
        for column, name in enumerate(triple):
            atom = np.flatnonzero((names == name) & structure.polymer[token])
            found[kind, column, token[atom]] = atom
    return np.where(protein, found[0], found[1]).T


def frame_features(
    structure: Structure, tokens: np.ndarray, atoms: CropAtoms, features: str = CORRECTED
) -> dict[str, np.ndarray]:
    """Frames of the tokens of a crop.

    Args:
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.

    Returns:
        ``frames_idx`` (n, 3) int32 atoms of the crop, the origin in the middle; and ``frame_resolved_mask`` (n,)
        float32, 1 where all three are resolved and not in line. A token without a frame has its first atom three times.
    """
    chosen = backbone_atoms(structure)[tokens]
    if features == BOLTZ2:
        chosen[structure.polymer[tokens] & (structure.res_type[tokens] == UNKNOWN[PROTEIN])] = -1
    inside = chosen - structure.atom_start[tokens][:, None] + atoms.start[:-1, None]
    has_frame = (chosen >= 0).all(axis=1)
    index = np.where(has_frame[:, None], inside, atoms.start[:-1, None])
    coords, resolved = structure.coords[atoms.atom], structure.resolved[atoms.atom]
    ligand = ~structure.polymer[tokens]
    asym_id = structure.asym_id[tokens]
    for chain in np.unique(asym_id[ligand]):
        own = np.flatnonzero(asym_id == chain)
        if len(own) >= 3:
            first = atoms.start[own]
            frames = _frames_of_ligand_in_boltz2 if features == BOLTZ2 else _frames_of_ligand
            index[own], has_frame[own] = first[frames(coords[first], resolved[first])], True
    mask = has_frame & resolved[index].all(axis=1) & spanning(torch.from_numpy(coords[index])).numpy()
    return {"frames_idx": index.astype(np.int32), "frame_resolved_mask": mask.astype(np.float32)}


def _frames_of_ligand(coords: np.ndarray, resolved: np.ndarray) -> np.ndarray:
    """(m, 3) of m atoms: the nearest resolved atom, the atom itself and the next nearest one."""
    frames = np.empty((len(coords), 3), dtype=np.int64)
    for start in range(0, len(coords), _BLOCK_ATOMS):
        stop = min(start + _BLOCK_ATOMS, len(coords))
        square = ((coords[start:stop, None] - coords) ** 2).sum(axis=-1)
        square[:, ~resolved] = np.inf
        frames[start:stop] = neighbours(torch.from_numpy(square), torch.arange(start, stop), stable=True)
    return frames


def _frames_of_ligand_in_boltz2(coords: np.ndarray, resolved: np.ndarray) -> np.ndarray:
    """The package's (m, 3) of m atoms, by its own arithmetic, on which the order of equal distances depends."""
    frames = np.empty((len(coords), 3), dtype=np.int64)
    for start in range(0, len(coords), _BLOCK_ATOMS):
        block = slice(start, start + _BLOCK_ATOMS)
        apart = ((coords[None] - coords[block, None]) ** 2).sum(-1) ** 0.5
        apart[~(resolved[None] & resolved[block, None])] = np.inf
        frames[block] = np.argsort(apart, axis=1)[:, [1, 0, 2]]
    return frames
