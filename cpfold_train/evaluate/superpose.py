"""Rigid superposition of points, and the TM-score, which searches for the best one."""

from __future__ import annotations

import biotite.structure as struc
import numpy as np

_FEWEST = 4
"""Points of the smallest fragment that a search starts from."""
_STARTS = 24
"""Most fragments of one length that a search starts from."""
_ROUNDS = 20


def superposition(mobile: np.ndarray, fixed: np.ndarray) -> struc.AffineTransformation:
    """What brings (n, 3) points closest to others; its ``apply`` moves any points.

    Kabsch, Acta Cryst. A 32, 922 (1976), as ``biotite.structure.superimpose`` has it, in fp32.
    """
    return struc.superimpose(fixed, mobile)[1]


def superposed_rmsd(mobile: np.ndarray, fixed: np.ndarray) -> float:
    """Root mean square distance in the units of the points, after the superposition."""
    return float(struc.rmsd(fixed, superposition(mobile, fixed).apply(mobile)))


def tm_score(mobile: np.ndarray, fixed: np.ndarray) -> float:
    """TM-score of n residues whose correspondence is known (Zhang and Skolnick, Proteins 57, 702, 2004).

    Fragments of n, n/2, n/4 ... residues are superposed, and again those residues that then lie near, until these stay
    the same; the best superposition counts.

    Args:
        mobile: (n, 3) in Angstrom.
        fixed: (n, 3), whose length sets the scale.
    """
    n = len(fixed)
    scale = max(0.5, 1.24 * np.cbrt(n - 15) - 1.8) if n > 15 else 0.5
    near = min(max(scale, 4.5), 8.0)
    best, length = 0.0, n
    while True:
        for start in np.unique(np.linspace(0, n - length, _STARTS).astype(int)):
            best = max(best, _refined(mobile, fixed, np.arange(start, start + length), scale, near))
        if length <= _FEWEST:
            return best
        length = max(length // 2, _FEWEST)


def _refined(mobile: np.ndarray, fixed: np.ndarray, chosen: np.ndarray, scale: float, near: float) -> float:
    best = 0.0
    for _ in range(_ROUNDS):
        moved = superposition(mobile[chosen], fixed[chosen]).apply(mobile)
        square = ((moved - fixed) ** 2).sum(axis=1)
        best = max(best, float((1 / (1 + square / scale**2)).mean()))
        within = np.flatnonzero(square < near**2)
        # A superposition needs three points, however far they are.
        following = within if len(within) >= 3 else np.sort(np.argsort(square, kind="stable")[:3])
        if np.array_equal(following, chosen):
            break
        chosen = following
    return best
