"""How well two chains meet: native contacts and DockQ (Basu and Wallner, PLoS ONE 11, e0161879, 2016)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import biotite.structure as struc
import numpy as np

from cpfold_train.data.features.contacts import cell_list
from cpfold_train.evaluate.match import Matched
from cpfold_train.evaluate.superpose import superposed_rmsd, superposition

CONTACT = 5.0
"""Angstrom between the nearest heavy atoms of two residues in contact."""
INTERFACE = 10.0
"""Angstrom to the other chain within which a residue belongs to the interface."""
_FEWEST = 3
BACKBONE = (b"N", b"CA", b"C", b"O", b"P", b"O5'", b"C5'", b"C4'", b"C3'", b"O3'")


def interface_scores(matched: Matched) -> list[dict[str, Any]]:
    """Scores of each pair of polymer chains in contact in the truth that have backbones to superpose.

    Returns:
        ``chains`` (i, j) of the truth, ``fnat`` the fraction of native contacts that the prediction has, ``irmsd`` in
        Angstrom of the interface's backbone, ``lrmsd`` of the smaller chain's backbone after superposition of the
        larger one's, and ``dockq`` made of the three.
    """
    found = []
    for first, second in combinations(np.unique(matched.chain[matched.polymer]).tolist(), 2):
        a, b = (np.flatnonzero(matched.chain == chain) for chain in (first, second))
        native = _contacts(matched.truth, matched.residue, a, b, CONTACT)
        distances = _rmsds(matched, a, b) if native else None
        if distances is None:
            continue
        kept = native & _contacts(matched.predicted, matched.residue, a, b, CONTACT)
        scores = {"fnat": len(kept) / len(native), **distances}
        scores["dockq"] = (scores["fnat"] + _scaled(scores["irmsd"], 1.5) + _scaled(scores["lrmsd"], 8.5)) / 3
        found.append({"chains": (first, second), **scores})
    return found


def _scaled(value: float, by: float) -> float:
    return 1 / (1 + (value / by) ** 2)


def _contacts(coords: np.ndarray, residue: np.ndarray, a: np.ndarray, b: np.ndarray, distance: float) -> set:
    """Pairs of residues of two chains that have atoms within the distance."""
    low, high = coords[b].min(axis=0) - distance, coords[b].max(axis=0) + distance
    around = a[((coords[a] > low) & (coords[a] < high)).all(axis=1)]
    if not len(around):
        return set()
    near = cell_list(coords[b], distance).get_atoms(coords[around], distance)
    row, column = np.nonzero(near >= 0)
    pairs = np.stack([residue[around[row]], residue[b[near[row, column]]]], axis=1)
    return set(map(tuple, pairs.tolist()))


def _rmsds(matched: Matched, a: np.ndarray, b: np.ndarray) -> dict[str, float] | None:
    """None where fewer than three backbone atoms would be superposed."""
    close = _contacts(matched.truth, matched.residue, a, b, INTERFACE)
    own, others = ({pair[end] for pair in close} for end in (0, 1))
    backbone = np.isin(matched.name, BACKBONE)
    chosen = np.concatenate(
        [part[np.isin(matched.residue[part], list(residues))] for part, residues in ((a, own), (b, others))]
    )
    chosen = chosen[backbone[chosen]]
    larger, smaller = sorted((a[backbone[a]], b[backbone[b]]), key=len, reverse=True)
    if min(map(len, (chosen, larger, smaller))) < _FEWEST:
        return None
    onto_larger = superposition(matched.predicted[larger], matched.truth[larger])
    return {
        "irmsd": superposed_rmsd(matched.predicted[chosen], matched.truth[chosen]),
        "lrmsd": float(struc.rmsd(matched.truth[smaller], onto_larger.apply(matched.predicted[smaller]))),
    }
