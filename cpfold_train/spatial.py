"""Geometry that data and model have in common. It imports little, for data workers import it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_COSINE = 0.9063
"""Atoms are in line where the angle at the origin is within 25 degrees of 0 or 180."""
MIN_LENGTH = 0.01
"""Angstrom between the origin and each of the other two."""


def rotation_rows(w: Any, x: Any, y: Any, z: Any) -> list[list[Any]]:
    """The three rows of the rotations of unit quaternions, whose components are all tensors or all arrays."""
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]


def spanning(points: Tensor) -> Tensor:
    """(...,) bool of (..., 3, 3) points: the two around the middle one are apart from it and not in line with it."""
    first, second = points[..., 1, :] - points[..., 0, :], points[..., 1, :] - points[..., 2, :]
    lengths = first.norm(dim=-1), second.norm(dim=-1)
    cosine = (first * second).sum(-1) / ((lengths[0] + 1e-6) * (lengths[1] + 1e-6))
    return (cosine.abs() < MAX_COSINE) & (torch.minimum(*lengths) > MIN_LENGTH)


def neighbours(apart: Tensor, itself: Tensor, stable: bool = False) -> Tensor:
    """Columns (..., r, 3) of the point nearest to each of r points, of the point itself, and of the next nearest.

    Args:
        apart: (..., r, n) distances or their squares; far where a point may not be taken.
        itself: (..., r) column of the point itself, which is taken however far.
        stable: of points equally near the first ones, which costs a sort; else whichever.
    """
    apart = apart.scatter(-1, itself[..., None], -1.0)
    if stable:
        nearest = apart.sort(dim=-1, stable=True).indices[..., :3]
    else:
        nearest = apart.topk(min(3, apart.shape[-1]), largest=False).indices
    # Not by a list of columns, which would be copied to the device, and waited for.
    return torch.cat([nearest[..., 1:2], nearest[..., :1], nearest[..., 2:]], -1)
