"""Distances between points, and how near is right."""

from __future__ import annotations

from torch import Tensor

LDDT_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
"""Distance errors in Angstrom that lDDT averages over (Mariani et al. 2013)."""


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Between points (..., r, 3) and (..., n, 3): (..., r, n).

    Component by component, not by a matrix product, which would lose the digits of near points; and so a pair's is the
    same number whatever r and n are.
    """
    return sum((first[..., :, None, x] - second[..., None, :, x]).square() for x in range(3)).sqrt()
