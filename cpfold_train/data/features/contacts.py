"""Which chains lie close to which: clashes and interfaces, from a cell list and never from all pairs of atoms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from biotite.structure import CellList

from cpfold_train.data.structures.structure import Structure

CLASH_DISTANCE = 1.7
"""Angstrom."""

CLASH_FRACTION = 0.3
INTERFACE_DISTANCE = 5.0
"""Angstrom between the nearest heavy atoms of two chains that have an interface (AlphaFold 3, supplement 2.5.1)."""

_BLOCK = 4096
_MOST_CELLS = 256
"""Cells along the longest side of the box around all atoms."""


def interfaces(structure: Structure) -> list[list[int]]:
    """Pairs [i, j], i < j, of chains with resolved atoms less than ``INTERFACE_DISTANCE`` apart, in ascending order."""
    chain, coords = _resolved(structure)
    pairs: set[tuple[int, int]] = set()
    for atom, other in _neighbours(chain, coords, INTERFACE_DISTANCE):
        both = np.stack([chain[atom], chain[other]], axis=1)
        pairs.update(map(tuple, np.unique(both[both[:, 0] < both[:, 1]], axis=0).tolist()))
    return [list(pair) for pair in sorted(pairs)]


def clashing_chains(structure: Structure) -> list[int]:
    """Chains to remove because they lie within others (AlphaFold 3, supplement 2.5.4).

    A chain clashes with another if more than ``CLASH_FRACTION`` of its resolved atoms are within ``CLASH_DISTANCE`` of
    an atom of that one. Where each clashes with the other, the one with the greater fraction goes; at equal fractions
    the one with fewer atoms, and then the later one.
    """
    chain, coords = _resolved(structure)
    size = np.bincount(chain, minlength=len(structure.meta["chains"]))
    clashing: dict[tuple[int, int], int] = {}
    for atom, other in _neighbours(chain, coords, CLASH_DISTANCE):
        touched = np.unique(np.stack([atom, chain[other]], axis=1), axis=0)
        pairs, counts = np.unique(np.stack([chain[touched[:, 0]], touched[:, 1]], axis=1), axis=0, return_counts=True)
        for pair, count in zip(map(tuple, pairs.tolist()), counts.tolist()):
            clashing[pair] = clashing.get(pair, 0) + count
    fraction = {(a, b): count / size[a] for (a, b), count in clashing.items() if count > CLASH_FRACTION * size[a]}
    removed: set[int] = set()
    for a, b in sorted(fraction):
        if a in removed or b in removed:
            continue
        removed.add(max((fraction[pair], -size[pair[0]], pair[0]) for pair in ((a, b), (b, a)) if pair in fraction)[2])
    return sorted(removed)


def cell_list(coords: np.ndarray, distance: float) -> CellList:
    """Cells for neighbours within a distance, however far apart the atoms lie.

    The list has a cell for every part of the box around them: small ones would fill the memory where the box is large,
    as that of a prediction of an untrained model.

    Args:
        coords: (A, 3) in Angstrom, A > 0.
        distance: in Angstrom.
    """
    extent = float((coords.max(axis=0) - coords.min(axis=0)).max())
    return CellList(coords, cell_size=max(distance, extent / _MOST_CELLS))


def _resolved(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Chain and coordinates of the resolved atoms."""
    chain = structure.asym_id[structure.atom_token]
    return chain[structure.resolved].astype(np.int64), structure.coords[structure.resolved]


def _neighbours(chain: np.ndarray, coords: np.ndarray, distance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of atoms of different chains less than ``distance`` apart, each pair both ways, by blocks of atoms."""
    if not len(coords):
        return
    cells = cell_list(coords, distance)
    for start in range(0, len(coords), _BLOCK):
        near = cells.get_atoms(coords[start : start + _BLOCK], distance)
        row, column = np.nonzero(near >= 0)
        atom, other = start + row, near[row, column]
        apart = chain[atom] != chain[other]
        yield atom[apart], other[apart]
