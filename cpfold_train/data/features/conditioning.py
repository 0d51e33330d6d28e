"""Pockets and contacts that a training sample gives away, so that the model learns to follow such hints.

As Boltz-2's training does it (``boltz/data/feature/featurizerv2.py``, ``process_token_features``): with some
probability a binder is chosen and some residues of its pocket are named, and with some probability a pair of tokens in
contact, each with the distance below which they are; again and again, until a draw says no. There, and here with the
features ``boltz2``, a contact's threshold is forgotten, and a pocket has only residues whose center atom is resolved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpfold_train.data.features.atoms import CropAtoms
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Interval
from cpfold_train.vocabulary import BOLTZ2, CORRECTED

UNSPECIFIED, UNSELECTED, POCKET_TO_BINDER, BINDER_TO_POCKET, CONTACT = range(5)
"""Classes of ``contact_conditioning``: unspecified where a sample says nothing, unselected where it says nothing of a
pair."""

CUTOFFS = (4.0, 20.0)
"""Angstrom between the nearest atoms; a threshold d is drawn with density 1 / d."""

_POCKET_STOP = 0.3
"""A pocket names one residue more than a geometric draw of this probability."""
_SEPARATION = 8
"""Residues between the two tokens of a contact within a chain are more than this."""
_CONTACT_TOKENS = 64
"""A contact is drawn among those of so many tokens, drawn before: nearly uniform, and never all pairs."""
_BLOCK_ATOMS = 64


class Condition(NamedTuple):
    """What is said of all pairs of two sets of tokens of a crop.

    Attributes:
        rows: (k,) int64.
        columns: (l,) int64.
        kind: class of ``contact_conditioning``.
        threshold: Angstrom.
    """

    rows: np.ndarray
    columns: np.ndarray
    kind: int
    threshold: float


class _Points(NamedTuple):
    """The resolved atoms of a crop: (P, 3) coordinates and (P,) tokens."""

    coords: np.ndarray
    token: np.ndarray

    def where(self, chosen: np.ndarray) -> _Points:
        return _Points(self.coords[chosen], self.token[chosen])

    def near(self, others: _Points, cutoff: float) -> np.ndarray:
        """Tokens of these points that have an atom nearer than ``cutoff`` to one of the others, ascending."""
        found = np.zeros(len(self.coords), dtype=bool)
        for start in range(0, len(others.coords), _BLOCK_ATOMS):
            # Atoms that follow each other are near each other: few points lie around their box.
            block = others.coords[start : start + _BLOCK_ATOMS]
            around = (self.coords > block.min(axis=0) - cutoff) & (self.coords < block.max(axis=0) + cutoff)
            open_ = np.flatnonzero(~found & around.all(axis=1))
            square = sum((self.coords[open_, x, None] - block[:, x]) ** 2 for x in range(3))
            found[open_] = (square < cutoff**2).any(axis=1)
        return np.unique(self.token[found])


def draw_conditions(
    structure: Structure,
    tokens: np.ndarray,
    atoms: CropAtoms,
    pocket: float,
    contact: float,
    rng: np.random.Generator,
    features: str = CORRECTED,
) -> list[Condition]:
    """Draw the pockets and contacts of a crop.

    Args:
        pocket: probability of a pocket, and of another one after each.
        contact: the same for contacts.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.

    Returns:
        Conditions; of two about the same pair the later one counts.
    """
    resolved = structure.resolved[atoms.atom]
    points = _Points(structure.coords[atoms.atom[resolved]], atoms.token[resolved])
    asym_id, polymer = structure.asym_id[tokens], structure.polymer[tokens]
    named = polymer & structure.center[1][tokens] if features == BOLTZ2 else polymer
    conditions = _pockets(points, asym_id, polymer, named, pocket, rng)
    while rng.random() < contact:
        drawn = _contact(points, asym_id, structure.res_index[tokens], rng)
        conditions += [c._replace(threshold=0.0) for c in drawn] if features == BOLTZ2 else drawn
    return conditions


def _cutoff(rng: np.random.Generator) -> float:
    low, high = CUTOFFS
    return float(low * (high / low) ** rng.random())


def _pockets(
    points: _Points,
    asym_id: np.ndarray,
    polymer: np.ndarray,
    named: np.ndarray,
    probability: float,
    rng: np.random.Generator,
) -> list[Condition]:
    """Binders are ligands, or chains where there is no ligand; a pocket is of tokens of other chains that may be
    ``named``."""
    ligands = np.unique(asym_id[~polymer])
    conditions = []
    for binder in rng.permutation(ligands if len(ligands) else np.unique(asym_id)):
        if rng.random() >= probability:
            break
        cutoff = _cutoff(rng)
        chain = asym_id[points.token]
        pocket = points.where((chain != binder) & named[points.token]).near(points.where(chain == binder), cutoff)
        if len(pocket):
            size = min(len(pocket), 1 + rng.geometric(_POCKET_STOP))
            some, of_binder = rng.choice(pocket, size, replace=False), np.flatnonzero(asym_id == binder)
            conditions.append(Condition(of_binder, some, BINDER_TO_POCKET, cutoff))
            conditions.append(Condition(some, of_binder, POCKET_TO_BINDER, cutoff))
    return conditions


def _contact(points: _Points, asym_id: np.ndarray, res_index: np.ndarray, rng: np.random.Generator) -> list[Condition]:
    """One pair of tokens of two chains that touch, or of distant residues where there is one chain; none if no such."""
    cutoff, chains = _cutoff(rng), np.unique(asym_id)
    if len(chains) > 1:
        own = asym_id[points.token] == rng.choice(chains)
        touching = points.where(~own).near(points.where(own), cutoff)
        if len(touching):
            partner = rng.choice(np.unique(asym_id[touching]))
            touching = touching[asym_id[touching] == partner]
        others = points.where(own)
    else:
        touching, others = np.unique(points.token), points
    # All partners of a few tokens instead of all pairs, of which there may be millions.
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for token in rng.permutation(touching)[:_CONTACT_TOKENS]:
        candidates = others
        if len(chains) == 1:
            candidates = others.where(np.abs(res_index[others.token] - res_index[token]) > _SEPARATION)
        near = candidates.near(points.where(points.token == token), cutoff)
        pairs.append(np.stack([np.full(len(near), token), near], axis=1))
    found = np.concatenate(pairs)
    if not len(found):
        return []
    first, second = found[rng.integers(len(found))][:, None]
    return [Condition(first, second, CONTACT, cutoff), Condition(second, first, CONTACT, cutoff)]


def conditioning_tile(
    conditions: list[Condition], count: int, rows: Interval, columns: Interval
) -> dict[str, np.ndarray]:
    """One tile of what is said about the pairs of ``count`` tokens.

    Returns:
        ``contact_conditioning`` (n_r, n_c) uint8 classes, which the package has one-hot, and ``contact_threshold``
        (n_r, n_c) float32 in Angstrom, 0 where nothing is said.
    """
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    kinds, thresholds = np.full(shape, UNSPECIFIED, dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    if conditions:
        kinds[: max(0, count - rows[0]), : max(0, count - columns[0])] = UNSELECTED
    for condition in conditions:
        i = condition.rows[(condition.rows >= rows[0]) & (condition.rows < rows[1])] - rows[0]
        j = condition.columns[(condition.columns >= columns[0]) & (condition.columns < columns[1])] - columns[0]
        kinds[np.ix_(i, j)], thresholds[np.ix_(i, j)] = condition.kind, condition.threshold
    return {"contact_conditioning": kinds, "contact_threshold": thresholds}
