"""Distances between points."""

from __future__ import annotations

from torch import Tensor


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Between points (..., r, 3) and (..., n, 3): (..., r, n).

    Component by component, not by a matrix product, which would lose the digits of near points; and so a pair's is the
    same number whatever r and n are.
    """
    return sum((first[..., :, None, x] - second[..., None, :, x]).square() for x in range(3)).sqrt()
