"""Choose the tokens of a crop. Pure functions of a generator; the tokens keep their order.

A crop has at most ``max_tokens`` tokens and ``max_atoms`` atoms, and a complex within both limits is taken whole. The
tokens of a ligand's residue come together or not at all, as in Boltz-2. Nothing here is quadratic in the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError

CROPS = ("spatial", "interface", "contiguous", "neighbourhood")

INTERFACE_DISTANCE = 15.0
"""Angstrom between center atoms below which a token is at an interface (AlphaFold 3, supplement 2.7)."""

NEIGHBOURHOODS = np.arange(0, 41, 2)
"""Sizes of the stretches that a neighbourhood crop is made of, one drawn for each crop (Boltz-1, algorithm 3)."""

Focus = tuple[int, ...]
"""What a crop is to show: a chain (i,), an interface of two chains (i, j), or () for whatever the crop draws."""


SPATIAL: Mapping[str, float] = {"spatial": 1.0}


def crop_tokens(
    structure: Structure,
    rng: np.random.Generator,
    *,
    max_tokens: int,
    max_atoms: int | None = None,
    kinds: Mapping[str, float] = SPATIAL,
    focus: Focus = (),
) -> np.ndarray:
    """Draw a crop.

    ``contiguous`` takes a stretch of each chain. The others start at a resolved token of the focus: ``spatial`` takes
    the nearest tokens, ``interface`` the same around a token near another chain, ``neighbourhood`` the nearest tokens
    with their neighbours in sequence.

    Args:
        max_tokens: most tokens.
        max_atoms: most atoms, None for no limit.
        kinds: relative probability of each kind of ``CROPS``.
        focus: what to show.

    Returns:
        (n,) int64, ascending.

    Raises:
        DataError: not even one residue fits.
    """
    kind = rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values()))
    atoms = len(structure.resolved)
    max_atoms = atoms if max_atoms is None else max_atoms
    if len(structure) <= max_tokens and atoms <= max_atoms:
        return np.arange(len(structure))
    if kind == "contiguous":
        tokens = contiguous_crop(structure, max_tokens, max_atoms, rng, focus)
    else:
        if kind != "spatial" and len(focus) < 2:
            focus = draw_focus(structure, rng, focus)
        # A small crop is made of small pieces.
        size = int(min(rng.choice(NEIGHBOURHOODS), max_tokens // 2)) if kind == "neighbourhood" else 0
        seed = draw_seed(structure, rng, focus, _fits(structure, max_tokens, max_atoms))
        tokens = neighbourhood_crop(structure, seed, size, max_tokens, max_atoms)
    if not len(tokens):
        raise DataError(f"no residue fits in a crop of {max_tokens} tokens and {max_atoms} atoms")
    return tokens


def _fits(structure: Structure, max_tokens: int, max_atoms: int) -> np.ndarray:
    """(L,) bool: the token's residue alone is within the limits."""
    start, stop = _windows(structure, 0)
    return (stop - start <= max_tokens) & (structure.atom_start[stop] - structure.atom_start[start] <= max_atoms)


def draw_focus(structure: Structure, rng: np.random.Generator, focus: Focus = ()) -> Focus:
    """One of the interfaces, if a chain is given one of its own; where there is none that chain, or any chain."""
    interfaces = [tuple(pair) for pair in structure.meta["interfaces"] if not focus or focus[0] in pair]
    if interfaces:
        return interfaces[rng.integers(len(interfaces))]
    return focus or (int(rng.integers(len(structure.meta["chains"]))),)


def draw_seed(structure: Structure, rng: np.random.Generator, focus: Focus, allowed: np.ndarray) -> int:
    """A resolved token of the focus; of an interface, one within ``INTERFACE_DISTANCE`` of the other chain.

    Chains that lie a little further apart are given another 5 Angstrom. Where the focus has no such token, any resolved
    token of its chains serves, and without one any resolved token at all.

    Args:
        allowed: (L,) bool, tokens that may be drawn.
    """
    center, known = structure.center
    anywhere = known & allowed if (known & allowed).any() else known
    candidates = np.flatnonzero(anywhere & np.isin(structure.asym_id, focus)) if focus else np.flatnonzero(anywhere)
    if not len(candidates):
        candidates, focus = np.flatnonzero(anywhere), ()
    order = rng.permutation(candidates)
    if len(focus) == 2:
        first, second = (center[candidates[structure.asym_id[candidates] == chain]] for chain in focus)
        for distance in (INTERFACE_DISTANCE, INTERFACE_DISTANCE + 5):
            for token in order[_in_box(center[order], first, distance) & _in_box(center[order], second, distance)]:
                others = second if structure.asym_id[token] == focus[0] else first
                if (_distance2(others, center[token]) < distance**2).any():
                    return int(token)
    return int(order[0])


def _in_box(points: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """(n,) bool: which points (n, 3) are no further than ``distance`` from the bounding box of the others (m, 3)."""
    if not len(others):
        return np.zeros(len(points), dtype=bool)
    return ((points >= others.min(0) - distance) & (points <= others.max(0) + distance)).all(axis=1)


def _distance2(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((points - point) ** 2).sum(axis=-1)


def neighbourhood_crop(structure: Structure, seed: int, size: int, max_tokens: int, max_atoms: int) -> np.ndarray:
    """Walk the resolved tokens by distance from the seed, adding each with its neighbours in sequence.

    A token brings its whole chain if that has at most ``size`` tokens, else the residues at most d away in sequence,
    with the smallest d that gives ``size`` tokens. The walk ends before the first step that would break a limit. With
    ``size`` 0 this is AlphaFold 3's spatial crop, whole residues at a time (Boltz-1, algorithm 3).
    """
    center, known = structure.center
    resolved = np.flatnonzero(known)
    order = resolved[np.argsort(_distance2(center[resolved], center[seed]), kind="stable")]
    start, stop = _windows(structure, size)
    # Each token comes at the first step whose window holds it.
    length = (stop - start)[order]
    step = np.repeat(np.arange(len(order)), length)
    brought = np.arange(len(step)) + np.repeat(start[order] - np.cumsum(length) + length, length)
    # The step at which each token comes, ``len(order)`` for never; the crop is all that came before the first step
    # that breaks a limit, so sums by step are enough.
    came = np.full(len(structure), len(order))
    np.minimum.at(came, brought, step)
    atoms = np.bincount(came, np.diff(structure.atom_start), minlength=len(order))[: len(order)]
    tokens = np.bincount(came, minlength=len(order))[: len(order)]
    too_many = (np.cumsum(tokens) > max_tokens) | (np.cumsum(atoms) > max_atoms)
    steps = int(too_many.argmax()) if too_many.any() else len(order)
    return np.flatnonzero(came < steps)


def _windows(structure: Structure, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(L,) first token and (L,) end of the stretch that each token brings along."""
    asym_id, res_index = structure.asym_id.astype(np.int64), structure.res_index.astype(np.int64)
    # Chain and residue as one ascending number, with room between chains for the widest stretch.
    room = int(res_index.max()) + 2 * size + 2
    residue = asym_id * room + res_index
    # All tokens widen their stretch by one residue on either side, as long as it has fewer than ``size`` tokens.
    distance = np.zeros(len(residue), dtype=np.int64)
    chain_start, chain_stop = np.searchsorted(asym_id, asym_id), np.searchsorted(asym_id, asym_id, side="right")
    whole = chain_stop - chain_start <= size
    for _ in range(size):
        start, stop = _stretch(residue, distance)
        distance += (stop - start < size) & ~whole
    start, stop = _stretch(residue, distance)
    return np.where(whole, chain_start, start), np.where(whole, chain_stop, stop)


def _stretch(residue: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.searchsorted(residue, residue - distance), np.searchsorted(residue, residue + distance, side="right")


def contiguous_crop(
    structure: Structure, max_tokens: int, max_atoms: int, rng: np.random.Generator, focus: Focus = ()
) -> np.ndarray:
    """One stretch of random length from each chain, chains in random order (AlphaFold-Multimer, algorithm 1).

    The chains of the focus come first and are not left out. A stretch ends at residues: it is widened to them where
    there is room.
    """
    residue_start, residue_stop = _windows(structure, 0)
    chains = sorted(rng.permutation(np.unique(structure.asym_id)), key=lambda chain: chain not in focus)
    added, atoms, left = 0, 0, len(structure)
    pieces = []
    for chain in chains:
        first, end = np.searchsorted(structure.asym_id, [chain, chain + 1])
        left -= end - first
        most = min(max_tokens - added, end - first)
        least = min(most, max(int(chain in focus), max_tokens - added - left))
        length = int(rng.integers(least, most + 1))
        if not length:
            continue
        start = first + int(rng.integers(0, end - first - length + 1))
        start, stop = residue_start[start], residue_stop[start + length - 1]
        room = np.searchsorted(structure.atom_start, structure.atom_start[start] + max_atoms - atoms, side="right") - 1
        room = min(room, start + max_tokens - added)
        if stop > room:
            stop = residue_start[room]
        pieces.append(np.arange(start, stop))
        added += len(pieces[-1])
        atoms += structure.atom_start[stop] - structure.atom_start[start]
    return np.sort(np.concatenate(pieces)) if pieces else np.zeros(0, dtype=np.int64)
