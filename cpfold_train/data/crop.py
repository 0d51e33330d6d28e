"""Choose the tokens of a crop. Pure functions of a generator; the tokens keep their order."""

from __future__ import annotations

import numpy as np

from cpfold_train.data.structure import Structure

CROPS = ("spatial", "contiguous")

INTERFACE_DISTANCE = 15.0
"""Angstrom between center atoms below which two chains are in contact (AlphaFold 3)."""

_SEED_TRIES = 256


def crop_tokens(structure: Structure, size: int, kind: str, interface: float, rng: np.random.Generator) -> np.ndarray:
    """Tokens of one crop; the whole sample where it has no more than ``size`` tokens.

    Args:
        kind: one of ``CROPS``.
        interface: probability that a spatial crop is centred on an interface.

    Returns:
        (n,) int64, ascending, n <= size.
    """
    if len(structure) <= size:
        return np.arange(len(structure))
    if kind == "contiguous":
        return contiguous_crop(structure.asym_id, size, rng)
    return spatial_crop(*structure.center, structure.asym_id, size, interface, rng)


def spatial_crop(
    center: np.ndarray,
    resolved: np.ndarray,
    asym_id: np.ndarray,
    size: int,
    interface: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The ``size`` resolved tokens nearest to a seed token (AlphaFold 3, supplement 2.7).

    Args:
        center: (L, 3) Angstrom.
        resolved: (L,) bool.
        asym_id: (L,).
        interface: probability of asking for a seed near another chain.
    """
    candidates = np.flatnonzero(resolved)
    points = center[candidates]
    at_interface = rng.random() < interface
    order = rng.permutation(len(candidates))
    seed = order[0]
    if at_interface:
        # Trying tokens one by one is uniform over the interface and never needs all distances.
        for token in order[:_SEED_TRIES]:
            others = asym_id[candidates] != asym_id[candidates[token]]
            if (_distance2(points[others], points[token]) < INTERFACE_DISTANCE**2).any():
                seed = token
                break
    nearest = np.argsort(_distance2(points, points[seed]), kind="stable")[:size]
    return np.sort(candidates[nearest])


def _distance2(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((points - point) ** 2).sum(axis=-1)


def contiguous_crop(asym_id: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One stretch of random length from each chain, chains in random order (AlphaFold-Multimer, algorithm 1)."""
    chains = rng.permutation(np.unique(asym_id))
    added, left = 0, len(asym_id)
    pieces = []
    for chain in chains:
        tokens = np.flatnonzero(asym_id == chain)
        left -= len(tokens)
        most = min(size - added, len(tokens))
        least = min(len(tokens), max(0, size - added - left))
        length = int(rng.integers(least, most + 1))
        start = int(rng.integers(0, len(tokens) - length + 1))
        pieces.append(tokens[start : start + length])
        added += length
    return np.sort(np.concatenate(pieces))
