"""Which three atoms span the frame of each token (AlphaFold 3, supplement 4.3.2).

As ``compute_frame_pred`` of ``boltz/model/layers/confidence_utils.py``: a polymer's residue has its backbone's frame,
an atom of a ligand that of the two atoms nearest to it in its chain, which coordinates decide. One rule
(:mod:`cpfold_train.spatial`) for three callers:
:func:`token_frames` for losses, where nothing may wait for the GPU; :func:`frame_points` for scores of predictions,
which looks at the few atoms of ligands only; and ``data/features/frames.py`` for the truth, from arrays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import in_blocks, rows_per_block
from cpfold_train.ops.atoms_at import atoms_at
from cpfold_train.ops.distances import distances
from cpfold_train.ops.shards import gather_shards, own_shard
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.spatial import neighbours
from cpfold_train.vocabulary import NONPOLYMER

BLOCK_PAIRS = 1 << 22
"""Pairs of ligand atoms whose distances are held at a time."""
_FAR = 1e9
"""Angstrom: further than any atom."""


def token_frames(coords: Tensor, resolved: Tensor, feats: dict[str, Tensor], cp: ContextParallel, op: str) -> Tensor:
    """Atoms a, b, c of each token's frame; those of a token without a frame coincide.

    Args:
        coords: (S, A, 3) all atoms of S samples, on every rank; S is a multiple of B.
        resolved: (S, A), non-zero where an atom may be another's neighbour.
        feats: ``frames_idx`` (B, N, 3), ``token_to_rep_atom``, ``asym_id``, ``mol_type`` and ``token_pad_mask`` (B, N),
            replicated.
        cp: the running grid.
        op: name for the ledger.

    Returns:
        (S, N, 3) int64 atoms, on every rank; each rank finds those of its part of the tokens.
    """
    samples = len(coords) // len(feats["asym_id"])
    # An atom of a ligand is a token of its own. Padding and polymers are in no ligand's chain.
    ligand = (feats["mol_type"] == NONPOLYMER) & (feats["token_pad_mask"] > 0)
    chain = torch.where(ligand, feats["asym_id"].long(), -1)
    atom, chain, fixed = (
        x.long().repeat_interleave(samples, 0) for x in (feats["token_to_rep_atom"], chain, feats["frames_idx"])
    )
    points = coords.gather(1, atom[..., None].expand(-1, -1, 3))
    known = resolved.gather(1, atom) > 0
    token = torch.arange(atom.shape[1], device=atom.device).expand_as(atom)
    rows = rows_per_block(6 * points[..., 0].nbytes, points.device)
    inputs = [own_shard(x, cp) for x in (points, chain, token, fixed)]
    return gather_shards(in_blocks(_frames_of_rows, rows, inputs, (points, chain, known, atom)), cp, op)


def _frames_of_rows(
    own_points: Tensor,
    own_chain: Tensor,
    own_token: Tensor,
    own_fixed: Tensor,
    points: Tensor,
    chain: Tensor,
    known: Tensor,
    atom: Tensor,
) -> Tensor:
    """Frames of rows of tokens: (S, r, ...) of the rows and (S, N, ...) of all tokens to (S, r, 3)."""
    same = (own_chain[..., None] == chain[:, None]) & (own_chain >= 0)[..., None]
    apart = distances(own_points, points)
    # Nearest are the resolved atoms of the chain, then its unresolved ones, then those of other chains.
    apart = torch.where(same & known[:, None], apart, 2 * _FAR).masked_fill(~same, 4 * _FAR)
    nearest = neighbours(apart, own_token)
    found = atom.gather(1, nearest.flatten(1)).view_as(nearest)
    return torch.where((same.sum(2) >= 3)[..., None], found, own_fixed)


def frame_points(x_pred: Tensor, center: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """Three atoms of each token that span its frame in a prediction, the origin in the middle.

    Args:
        x_pred: part (B M, A/P, 3) of the atoms.
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
        if not len(atoms):
            continue
        _, own, sizes = torch.unique(chain[atoms], return_inverse=True, return_counts=True)
        large = sizes[own] >= 3
        atoms, own = atoms[large], own[large]
        for m in range(b * samples, (b + 1) * samples) if len(atoms) else ():
            points[m, atoms] = _points_of_ligands(center[m, atoms], own)
    return points


def _points_of_ligands(x: Tensor, group: Tensor) -> Tensor:
    """(n, 3, 3) of n points (n, 3): the nearest point of its group (n,), the point itself, and the next nearest."""
    found = []
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK_PAIRS // len(x))):
        square = (x[rows, None] - x).square().sum(-1)
        found.append(neighbours(square.masked_fill(group[rows, None] != group, torch.inf), rows))
    return x[torch.cat(found)]
