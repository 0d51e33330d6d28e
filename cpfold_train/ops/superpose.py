"""Superpositions from sums over points, so that points may be sharded and sums of many sets be added up."""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.quaternions import rotation_of_most_overlap


def moments(first: Tensor, second: Tensor) -> Tensor:
    """Products of (1, p, |p|^2) and (1, x, |x|^2) of points p, x (..., 3): (..., 5, 5). Their sums are what the other
    functions take."""
    one = torch.ones_like(first[..., :1])
    p, x = (torch.cat([one, y, y.square().sum(-1, keepdim=True)], -1) for y in (first, second))
    return p[..., :, None] * x[..., None, :]


def rigid_motion(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation (..., 3, 3) and shift (..., 3) that lay the second points on the first; the identity for no points."""
    _, p, x, rotation, _ = _kabsch(sums)
    return rotation, p - (rotation @ x[..., None]).squeeze(-1)


def least_squares(sums: Tensor) -> Tensor:
    """Sum of squared distances (...,) of the superposed points."""
    # sum |p - R x|^2 of centred points is sum |p|^2 + sum |x|^2 - 2 sum p . R x; centring takes n |mean|^2 off those.
    count, p, x, _, overlap = _kabsch(sums)
    spread = sums[..., 4, 0] - count * p.square().sum(-1) + sums[..., 0, 4] - count * x.square().sum(-1)
    return (spread - 2 * overlap).clamp(min=0)


def squared_distances(sums: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
    """Sum of squared distances (...,) after a given motion of the second points."""
    # Of sum |p - R x - t|^2, term by term: p and x here are sums of points, not means.
    p, x = sums[..., 1:4, 0], sums[..., 0, 1:4]
    moved = (rotation @ x[..., None]).squeeze(-1)
    total = sums[..., 4, 0] + sums[..., 0, 4] + sums[..., 0, 0] * shift.square().sum(-1)
    return (total - 2 * (rotation * sums[..., 1:4, 1:4]).sum((-2, -1)) + 2 * (shift * (moved - p)).sum(-1)).clamp(min=0)


def _kabsch(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Number of points, means, rotation, and the sum of products of centred p and rotated x."""
    count = sums[..., 0, 0]
    # Where there are no points all sums are zero, and so are the means.
    divisor = count.clamp(min=1)[..., None]
    p, x = sums[..., 1:4, 0] / divisor, sums[..., 0, 1:4] / divisor
    rotation, overlap = best_rotation(sums[..., 1:4, 1:4] - divisor[..., None] * p[..., :, None] * x[..., None, :])
    return count, p, x, rotation, overlap


def best_rotation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation (..., 3, 3) that brings x closest to p, and the sum of products of p and rotated x, of the sums of
    p x^T of centred points (..., 3, 3).

    By singular values on CPU, where they are a third of the work; on a GPU without a wait for the host.
    """
    if covariance.is_cuda:
        rotation = rotation_of_most_overlap(covariance)
        return rotation, (rotation * covariance).sum((-2, -1))
    u, sigma, vh = torch.linalg.svd(covariance)
    # Never mirrored: turned back along the direction in which that costs least, the last.
    sign = torch.linalg.det(u @ vh)
    rotation = torch.cat([u[..., :2], u[..., 2:] * sign[..., None, None]], -1) @ vh
    return rotation, sigma[..., 0] + sigma[..., 1] + sign * sigma[..., 2]
