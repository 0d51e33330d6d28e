"""What in the ground truth of a crop could be exchanged: copies of its chains, equivalent atoms of its residues.

The truth for a crop's chain may be any copy of it in the structure, in the crop or not, since nothing tells the model
which one it sees; and residues have atoms that only convention tells apart. The losses that compare a finished
prediction choose among these (:mod:`cpfold_train.losses.symmetry`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cpfold_train.data.features.atoms import CropAtoms
from cpfold_train.data.structures.automorphisms import automorphisms
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Interval
from cpfold_train.vocabulary import NUCLEOTIDES

MAX_COPIES = 16
"""Copies of a chain that are considered: those in the crop, then the nearest ones."""

_PHOSPHATE = ((b"OP1", b"OP2"),)
_RING = ((b"CD1", b"CD2"), (b"CE1", b"CE2"))
_EXCHANGED = {b"ASP": ((b"OD1", b"OD2"),), b"GLU": ((b"OE1", b"OE2"),), b"PHE": _RING, b"TYR": _RING}
_EXCHANGED |= {name.encode(): _PHOSPHATE for name in NUCLEOTIDES}
"""Atoms of standard residues that are exchanged together (``ref_symmetries`` in ``boltz/data/const.py``)."""


@dataclass(frozen=True)
class Symmetry:
    """Chains and atoms that a crop's truth could exchange.

    Attributes:
        chain_copies: (C, K) int32; row c has the copies of the crop's c-th chain, itself first: one more than their
            index among the structure's chains, 0 where there are fewer than K.
        copy_atom: (A, K) int64 atom of the structure that is the crop's atom in each copy, -1 where there is none.
        swaps: (A, S) int32, how many atoms further the atom is whose position each atom takes, in each of the other
            orders of its residue's equivalent atoms; 0 where there are fewer than S.
    """

    chain_copies: np.ndarray
    copy_atom: np.ndarray
    swaps: np.ndarray

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C, K and S."""
        return *self.chain_copies.shape, self.swaps.shape[1]


def find_symmetry(structure: Structure, tokens: np.ndarray, atoms: CropAtoms) -> Symmetry:
    """Chains and atoms that the truth of a crop could exchange."""
    asym_id = structure.asym_id[tokens].astype(np.int64)
    chains = np.unique(asym_id)
    first, stop = _chain_atoms(structure)
    listed = [_copies(structure, chain, chains, first, stop) for chain in chains]
    table = np.zeros((len(chains), max(map(len, listed), default=1)), dtype=np.int32)
    for own, copies in zip(table, listed):
        own[: len(copies)] = np.add(copies, 1)
    row = np.searchsorted(chains, asym_id[atoms.token])
    copies = table[row]
    # A copy has the same atoms in the same order, so an atom lies as far from its chain's first atom in each of them.
    begins = first[copies - 1]
    copy_atom = np.where(copies > 0, begins + (atoms.atom - begins[:, 0])[:, None], -1)
    return Symmetry(table, copy_atom, _swaps(structure, tokens, atoms))


def symmetry_features(
    structure: Structure, atoms: CropAtoms, symmetry: Symmetry, part: Interval
) -> dict[str, np.ndarray]:
    """Of the atoms in ``part``, which may reach past the last one.

    Returns:
        ``copy_coords`` (A, K, 3) float32 in Angstrom, from the same centre as ``coords``, and ``copy_resolved`` (A, K)
        uint8 of each atom in each copy of its chain; ``atom_swaps`` (A, S) int32.
    """
    source = symmetry.copy_atom[slice(*part)]
    resolved = (source >= 0) & structure.resolved[source]
    known = atoms.atom[structure.resolved[atoms.atom]]
    middle = structure.coords[known].mean(axis=0, dtype=np.float64) if len(known) else 0.0
    coords = np.where(resolved[..., None], structure.coords[source] - middle, 0).astype(np.float32)
    swaps = symmetry.swaps[slice(*part)]
    return {"copy_coords": coords, "copy_resolved": resolved.astype(np.uint8), "atom_swaps": swaps}


def _chain_atoms(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """First atom of each chain and the one after its last, (chains,) each."""
    chain = np.arange(len(structure.meta["chains"]))
    first, stop = (np.searchsorted(structure.asym_id, chain, side=side) for side in ("left", "right"))
    return structure.atom_start[first].astype(np.int64), structure.atom_start[stop].astype(np.int64)


def _copies(structure: Structure, chain: int, present: np.ndarray, first: np.ndarray, stop: np.ndarray) -> list[int]:
    """The chain itself, and its copies that have the same atoms."""
    entity, own = structure.chains["entity"], structure.ref_atom[first[chain] : stop[chain]]
    others = [int(i) for i in np.flatnonzero(entity == entity[chain]) if i != chain]
    others = [i for i in others if np.array_equal(structure.ref_atom[first[i] : stop[i]], own)]
    if len(others) >= MAX_COPIES:
        middle = [_middle(structure, first[i], stop[i]) for i in [chain, *others]]
        apart = {i: float(np.linalg.norm(point - middle[0])) for i, point in zip(others, middle[1:])}
        others.sort(key=lambda i: (i not in present, apart[i]))
    return [int(chain), *others[: MAX_COPIES - 1]]


def _middle(structure: Structure, first: int, stop: int) -> np.ndarray:
    known = structure.coords[first:stop][structure.resolved[first:stop]]
    return known.mean(axis=0) if len(known) else np.full(3, np.inf)


def _swaps(structure: Structure, tokens: np.ndarray, atoms: CropAtoms) -> np.ndarray:
    """:attr:`Symmetry.swaps`."""
    bounds = np.flatnonzero(np.diff(atoms.residue, prepend=-1, append=-1))
    standard = structure.polymer[tokens] & ~structure.modified[tokens]
    whole = _whole_residues(structure, tokens)
    bonds = _bonds_of(structure)
    found = []
    for start, end in pairwise(bounds.tolist()):
        own, token = atoms.atom[start:end], atoms.token[start]
        if standard[token]:
            others = _exchanged(structure, tokens[token], own)
        elif whole[token]:
            others = automorphisms(*_molecule(structure, own, bonds))
        else:
            continue
        if len(others):
            found.append((start, end, others - np.arange(len(own))))
    swaps = np.zeros((len(atoms.atom), max((len(others) for *_, others in found), default=0)), dtype=np.int32)
    for start, end, others in found:
        swaps[start:end, : len(others)] = others.T
    return swaps


def _whole_residues(structure: Structure, tokens: np.ndarray) -> np.ndarray:
    """(n,) bool: all tokens of the token's residue are in the crop."""
    begins = (np.diff(structure.asym_id, prepend=-1) != 0) | (np.diff(structure.res_index, prepend=-1) != 0)
    residue = np.cumsum(begins) - 1
    # As many tokens of the residue in the crop as in the structure.
    return (np.bincount(residue[tokens], minlength=residue[-1] + 1) == np.bincount(residue))[residue[tokens]]


def _exchanged(structure: Structure, token: int, own: np.ndarray) -> np.ndarray:
    """(0 or 1, n) the other order of the n atoms of a standard residue."""
    pairs = _EXCHANGED.get(bytes(structure.comp_name[structure.component[token]]), ())
    names = structure.comp_atom_name[structure.ref_atom[own]].tolist()
    if not all(name in names for pair in pairs for name in pair):
        return np.empty((0, len(own)), dtype=np.int64)
    other = np.arange(len(own))
    for a, b in pairs:
        i, j = names.index(a), names.index(b)
        other[[i, j]] = j, i
    return other[None][: len(pairs)]


def _bonds_of(structure: Structure) -> dict[int, list[tuple[int, int]]]:
    """The atoms bonded to each atom, and the types of those bonds."""
    found: dict[int, list[tuple[int, int]]] = {}
    for (i, j), kind in zip(structure.bond_atoms.tolist(), structure.bond_type.tolist()):
        found.setdefault(i, []).append((j, kind))
        found.setdefault(j, []).append((i, kind))
    return found


def _molecule(structure: Structure, own: np.ndarray, bonds: dict[int, list[tuple[int, int]]]) -> tuple:
    """Arguments of :func:`automorphisms` for all atoms of a residue."""
    index = {int(atom): i for i, atom in enumerate(own)}
    inner, linked = [], []
    for atom, i in index.items():
        partners = bonds.get(atom, [])
        inner += [(i, index[j], kind) for j, kind in partners if index.get(j, -1) > i]
        linked.append(any(j not in index for j, _ in partners))
    reference = structure.ref_atom[own]
    elements = tuple(structure.comp_element[reference].tolist())
    return elements, tuple(inner), tuple(linked), structure.comp_pos[reference].tobytes()
