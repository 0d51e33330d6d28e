"""Laying one structure onto another (AlphaFold 3, Algorithm 28; Kabsch, Acta Cryst. A32, 1976).

The atoms are sharded over the ranks. What the best rotation and translation depend on are 16 sums over atoms, so one
small all-reduce is all that is communicated. They are taken in fp64: the covariance is a difference of sums, and the
result must not depend on how the atoms are sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.superpose import best_rotation
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce

OP = "rigid_align"


@torch.no_grad()
def weighted_rigid_align(moving: Tensor, target: Tensor, weights: Tensor, mask: Tensor, cp: ContextParallel) -> Tensor:
    """``moving``, rotated (never mirrored) and shifted so that the weighted squared distances to ``target`` are least.

    Args:
        moving, target: (B*M, A/P, 3) this rank's shard of the atoms, in Angstrom.
        weights: (B*M, A/P) of each atom.
        mask: (B*M, A/P), 1 for atoms that count.
        cp: the running grid.

    Returns:
        (B*M, A/P, 3) in the dtype of ``moving``, without gradient. Where no atom counts, ``moving`` as it is; where
        those that do leave rotations open (they lie on a line, say), one of the best.
    """
    x, y, w = moving.double(), target.double(), (weights * mask).double()
    weighted = w[..., None] * y
    sums = [w.sum(1, keepdim=True), (w[..., None] * x).sum(1), weighted.sum(1), (weighted.mT @ x).flatten(1)]
    weight, x_sum, y_sum, products = all_reduce(torch.cat(sums, 1), cp, cp.all, OP).split([1, 3, 3, 9], 1)
    # Without atoms all sums are zero, and so is all that is divided by the weight.
    weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
    x_mean, y_mean = x_sum / weight, y_sum / weight
    # sum w (y - mean y)(x - mean x)^T, from sums that do not know the means yet.
    rotation, _ = best_rotation(products.unflatten(1, (3, 3)) - y_sum[:, :, None] * x_mean[:, None])
    return ((x - x_mean[:, None]) @ rotation.mT + y_mean[:, None]).to(moving.dtype)
