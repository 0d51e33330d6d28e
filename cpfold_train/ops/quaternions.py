"""Rotations by unit quaternions (w, x, y, z), with which the best superposition is an eigenvector."""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.spatial import rotation_rows

_ROUNDS = 10
"""Of four squarings each: the 2^40th power, so that eigenvalues count as apart that differ by 1e-11 of the largest."""


def rotations(quaternions: Tensor) -> Tensor:
    """(..., 4) quaternions of any length to (..., 3, 3) rotations; of normal deviates they are uniform."""
    unit = quaternions / torch.linalg.vector_norm(quaternions, dim=-1, keepdim=True)
    return torch.stack([torch.stack(row, -1) for row in rotation_rows(*unit.unbind(-1))], -2)


def rotation_of_most_overlap(covariance: Tensor) -> Tensor:
    """Rotations R (..., 3, 3) for which the sum of products of R and the covariance (..., 3, 3) is most.

    Their quaternions are the eigenvectors of the largest eigenvalues of 4 x 4 symmetric matrices (Horn, J. Opt. Soc.
    Am. A 4, 1987), never mirror images. An eigenvalue problem by iteration: a matrix that is squared again and again
    becomes the projection onto that eigenvector, or onto several where rotations are equally good, of which one is
    taken. 40 small products, as exact as a decomposition. Those of the library look on the host whether they have
    converged, for which a GPU would have to come to rest.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in covariance.unbind(-2))
    rows = [
        [xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, yy - xx - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, zz - xx - yy],
    ]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    size = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    # No eigenvalue below zero, so that the largest one is also the largest in size.
    power = matrix / size + torch.eye(4, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_ROUNDS):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        for _ in range(4):
            power = power @ power
    longest = power.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    return rotations(power.gather(-1, longest[..., None].expand(*longest.shape[:-1], 4, 1)).squeeze(-1))
