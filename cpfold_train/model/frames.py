"""Whether the frames of tokens can be trusted in a predicted structure.

AlphaFold 3, supplement 4.3.2, as in ``boltz/model/layers/confidence_utils.py`` (compute_frame_pred).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.atoms_at import atoms_at
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.vocabulary import NONPOLYMER

MAX_COSINE = 0.9063
"""Atoms are in line where the angle at the origin is within 25 degrees of 0 or 180."""
MIN_LENGTH = 0.01
BLOCK_PAIRS = 1 << 22
"""Pairs of ligand atoms whose distances are held at a time."""


def frame_points(x_pred: Tensor, center: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """Three atoms of each token that span its frame, the origin in the middle.

    A polymer's tokens have those of ``frames_idx``. An atom of a ligand of three atoms or more has the ligand's two
    atoms around it that are nearest in the predicted structure.

    Args:
        x_pred: atom share (B M, A/P, 3).
        center: (B M, N, 3) representative atoms, the same on all ranks; those of a ligand are its atoms.
        feats: ``frames_idx`` (B, N, 3), ``asym_id``, ``mol_type`` and ``token_pad_mask`` (B, N).
        cp: the running grid.

    Returns:
        (B M, N, 3, 3): atoms, then coordinates; the same on all ranks.
    """
    samples = len(x_pred) // len(feats["asym_id"])
    index = feats["frames_idx"].repeat_interleave(samples, 0)
    points = atoms_at(x_pred, index.flatten(1), cp).unflatten(1, (-1, 3))
    for b, (chain, kind, real) in enumerate(zip(feats["asym_id"], feats["mol_type"], feats["token_pad_mask"])):
        atoms = torch.nonzero((kind == NONPOLYMER) & (real > 0))[:, 0]
        _, own, sizes = torch.unique(chain[atoms], return_inverse=True, return_counts=True)
        large = sizes[own] >= 3
        atoms, own = atoms[large], own[large]
        for m in range(b * samples, (b + 1) * samples) if len(atoms) else ():
            points[m, atoms] = _nearest(center[m, atoms], own)
    return points


def _nearest(x: Tensor, group: Tensor) -> Tensor:
    """(n, 3, 3) of n points (n, 3): the nearest point of its group (n,), the point itself, and the next nearest."""
    found = []
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK_PAIRS // len(x))):
        square = (x[rows, None] - x).square().sum(-1)
        square = square.masked_fill(group[rows, None] != group, torch.inf)
        square[torch.arange(len(rows)), rows] = -1
        itself, first, second = square.topk(3, largest=False, sorted=True).indices.unbind(1)
        found.append(torch.stack([first, itself, second], 1))
    return x[torch.cat(found)]


def spanning(points: Tensor) -> Tensor:
    """(...,) bool of (..., 3, 3) points: the two around the middle one are apart from it and not in line with it."""
    first, second = points[..., 1, :] - points[..., 0, :], points[..., 1, :] - points[..., 2, :]
    lengths = first.norm(dim=-1), second.norm(dim=-1)
    cosine = (first * second).sum(-1) / ((lengths[0] + 1e-6) * (lengths[1] + 1e-6))
    return (cosine.abs() < MAX_COSINE) & (torch.minimum(*lengths) > MIN_LENGTH)
