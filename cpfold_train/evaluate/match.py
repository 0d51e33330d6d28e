"""Which chain and atom of a prediction is which of the truth.

Chains are alike if they have the same residues. Of several alike, a prediction may have put any in the place of any:
one chain is superposed on each of its candidates, the others are assigned to the nearest ones, and the assignment with
the lowest RMSD stays (AlphaFold-Multimer, supplement 7.3.1).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import biotite.structure as struc
import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError
from cpfold_train.evaluate.superpose import superposition


@dataclass(frozen=True)
class Matched:
    """The m atoms that are resolved in the truth and there in the prediction, chain by chain of the truth.

    Attributes:
        chain: (m,) int64 chain of the truth.
        residue: (m,) int64 residue of the chain.
        name: (m,) S4.
        polymer: (m,) bool.
        center: (m,) bool, the center atom (C-alpha, C1') of a polymer's residue.
        truth: (m, 3) float64 in Angstrom.
        predicted: (m, 3) float64.
        partners: chain of the prediction, by chain of the truth.
        resolved: resolved atoms of the truth, those that the prediction lacks included.
    """

    chain: np.ndarray
    residue: np.ndarray
    name: np.ndarray
    polymer: np.ndarray
    center: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    partners: dict[int, int]
    resolved: int


@dataclass(frozen=True)
class _Chain:
    """Resolved atoms of a chain: a key for each, which atoms of the structure they are, and which are centers."""

    keys: np.ndarray
    atom: np.ndarray
    center: np.ndarray


def match(truth: Structure, predicted: Structure) -> Matched:
    """Assign chains and pair atoms by residue and name.

    Raises:
        DataError: no polymer of the truth is in the prediction.
    """
    own, other = _chains(truth), _chains(predicted)
    partners = _assign(truth, predicted, own, other)
    pairs = [(chain, *_common(own[chain], other[partner])) for chain, partner in sorted(partners.items())]
    first = np.concatenate([first for _, first, _ in pairs])
    second = np.concatenate([second for _, _, second in pairs])
    chain = np.repeat([chain for chain, *_ in pairs], [len(first) for _, first, _ in pairs])
    token = truth.atom_token[first]
    center = truth.polymer[token] & (first == truth.atom_start[token] + truth.center_atom[token])
    return Matched(
        chain=chain,
        residue=truth.res_index[token].astype(np.int64),
        name=truth.comp_atom_name[truth.ref_atom[first]],
        polymer=truth.polymer[token],
        center=center,
        truth=truth.coords[first].astype(np.float64),
        predicted=predicted.coords[second].astype(np.float64),
        partners=partners,
        resolved=int(truth.resolved.sum()),
    )


def _chains(structure: Structure) -> dict[int, _Chain]:
    token = structure.atom_token
    names = structure.comp_atom_name[structure.ref_atom].view(np.uint32).astype(np.int64)
    keys = structure.res_index[token].astype(np.int64) << 32 | names
    is_center = structure.polymer[token]
    is_center = is_center & (np.arange(len(token)) == structure.atom_start[token] + structure.center_atom[token])
    owner = np.where(structure.resolved, structure.asym_id[token], -1)
    found = {}
    for asym_id in range(len(structure.meta["chains"])):
        atom = np.flatnonzero(owner == asym_id)
        if len(atom):
            found[asym_id] = _Chain(keys[atom], atom, is_center[atom])
    return found


def _common(first: _Chain, second: _Chain, centers: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Atoms that two chains share, as atoms of their structures, in the order of the keys."""
    a = first.center if centers else slice(None)
    b = second.center if centers else slice(None)
    _, i, j = np.intersect1d(first.keys[a], second.keys[b], return_indices=True)
    return first.atom[a][i], second.atom[b][j]


def _residues(structure: Structure, asym_id: int) -> tuple:
    own = np.flatnonzero(structure.asym_id == asym_id)
    first = own[np.unique(structure.res_index[own], return_index=True)[1]]
    return structure.meta["chains"][asym_id]["type"], *structure.comp_name[structure.component[first]].tolist()


def _assign(truth: Structure, predicted: Structure, own: dict[int, _Chain], other: dict[int, _Chain]) -> dict[int, int]:
    alike = defaultdict(list)
    for asym_id in other:
        alike[_residues(predicted, asym_id)].append(asym_id)
    polymers: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    ligands: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for chain in own:
        key = _residues(truth, chain)
        for candidate in alike[key]:
            listed = ligands if key[0] == "nonpolymer" else polymers
            pair = _common(own[chain], other[candidate], centers=key[0] != "nonpolymer")
            if len(pair[0]):
                listed[chain, candidate] = pair
    if not polymers:
        raise DataError("no protein, DNA or RNA chain of the truth is in the prediction")
    candidates = defaultdict(list)
    for chain, candidate in polymers:
        candidates[chain].append(candidate)
    sizes = {chain: max(len(polymers[chain, c][0]) for c in own) for chain, own in candidates.items()}
    # A chain that has few candidates and many residues says best how the two structures lie.
    anchor = min(candidates, key=lambda chain: (sizes[chain] < 3, len(candidates[chain]), -sizes[chain]))
    x, y = truth.coords.astype(np.float64), predicted.coords.astype(np.float64)
    found = []
    for candidate in candidates[anchor]:
        first, second = polymers[anchor, candidate]
        moved = _onto(y, second, x, first)
        partners = _greedy(polymers, x, moved)
        first, second = (np.concatenate(part) for part in zip(*(polymers[pair] for pair in partners.items())))
        moved = _onto(y, second, x, first)
        found.append((-len(partners), float(struc.rmsd(x[first], moved[second])), partners, moved))
    # By the number of partners first: chains without one must not pay.
    _, _, partners, moved = min(found, key=lambda assignment: assignment[:2])
    return partners | _greedy(ligands, x, moved)


def _onto(y: np.ndarray, mobile: np.ndarray, x: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    return superposition(y[mobile], x[fixed]).apply(y)


def _greedy(
    pairs: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]], x: np.ndarray, y: np.ndarray
) -> dict[int, int]:
    """Partners, each used once, the nearest pair first."""
    distance = {pair: float(struc.rmsd(x[first], y[second])) for pair, (first, second) in pairs.items()}
    partners: dict[int, int] = {}
    for chain, candidate in sorted(distance, key=lambda pair: distance[pair]):
        if chain not in partners and candidate not in partners.values():
            partners[chain] = candidate
    return partners
