"""The ground truth in the order of a prediction: symmetric chains, ligands and residues permuted for the best match.

After the chains (:mod:`cpfold_train.losses.chain_symmetry`), the equivalent atoms of a residue or ligand, which only
convention tells apart. Each of their orders is compared after superposition of the surroundings, the tokens within 15
Angstrom, so that a ligand is compared to its pocket even if the domains of the prediction lie otherwise to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import in_blocks, rows_per_block
from cpfold_train.losses.chain_symmetry import choose_copies, clearly_less, take_copies
from cpfold_train.ops.distances import distances
from cpfold_train.ops.shards import gather_shards, own_shard
from cpfold_train.ops.superpose import moments, rigid_motion
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce

OP = "symmetry"
ROUNDS = 3
"""How often each residue may change its order: what is found is combined with what was found before."""
SURROUNDINGS = 15.0
"""Angstrom."""
_FEWEST = 4
"""Tokens that fix a superposition; where fewer are near, all others do."""


@torch.no_grad()
def matched_truth(pred_coords: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> tuple[Tensor, Tensor]:
    """True coordinates (S, A/P, 3) of this rank's atoms for each of S = B*M predictions, and whether they are resolved,
    (S, A/P) bool. The names that the data came with win where another choice is no better.

    Args:
        pred_coords: (S, A/P, 3) in Angstrom, shard of atoms.
        feats: as for :func:`choose_copies`; ``atom_swaps`` (B, A/P, W) and ``ref_space_uid`` (B, A/P), shards of
            atoms; ``token_to_center_atom`` and ``token_pad_mask`` (B, N), replicated.
        cp: the running grid.
    """
    pred = pred_coords.double()
    samples = len(pred) // len(feats["asym_id"])
    coords, resolved = take_copies(choose_copies(pred, feats, cp), feats)
    coords, resolved = coords.to(pred), resolved > 0
    swaps, residue, token = (
        feats[name].long().repeat_interleave(samples, 0) for name in ("atom_swaps", "ref_space_uid", "atom_to_token")
    )
    if not swaps.shape[2]:
        return coords.to(pred_coords), resolved
    motion = _motions_of_surroundings(pred, coords, resolved, feats, cp)
    motion = motion.gather(1, token[..., None].expand(-1, -1, 12)).unflatten(2, (4, 3))
    # There and back, so that only the truth is gathered again and not the motion of where it comes from.
    local = ((pred - motion[..., 3, :])[..., None, :] @ motion[..., :3, :]).squeeze(-2)

    tokens, first = feats["asym_id"].shape[1], cp.all.index * pred.shape[1]
    atom = torch.arange(first, first + pred.shape[1], device=pred.device)
    for _ in range(ROUNDS):
        whole = gather_shards(torch.cat([coords, resolved[..., None].to(coords)], 2), cp, OP)
        costs = []
        for swap in (torch.zeros_like(swaps[..., 0]), *swaps.unbind(2)):
            truth = whole.gather(1, (atom + swap)[..., None].expand(-1, -1, 4))
            error = (local - truth[..., :3]).square().sum(2) * truth[..., 3]
            costs.append(torch.zeros_like(error[:, :1]).expand(-1, tokens).scatter_add(1, residue, error))
        costs = all_reduce(torch.stack(costs, 2), cp, cp.all, OP)
        lowest, best = costs.min(2)
        best = torch.where(clearly_less(lowest, costs[..., 0]), best, 0)
        chosen = best.gather(1, residue)[..., None]
        swap = torch.cat([torch.zeros_like(swaps[..., :1]), swaps], 2).gather(2, chosen).squeeze(2)
        found = whole.gather(1, (atom + swap)[..., None].expand(-1, -1, 4))
        coords, resolved = found[..., :3], found[..., 3] > 0
    return coords.to(pred_coords), resolved


def _motions_of_surroundings(
    pred: Tensor, truth: Tensor, resolved: Tensor, feats: dict[str, Tensor], cp: ContextParallel
) -> Tensor:
    """Rotation and shift, (S, N, 12) on every rank, that lay the truth around each token on the prediction."""
    samples = len(pred) // len(feats["asym_id"])
    residue = feats["ref_space_uid"].to(pred).repeat_interleave(samples, 0)
    parts = pred, truth, resolved[..., None].to(pred), residue[..., None]
    whole = gather_shards(torch.cat(parts, 2), cp, OP)
    centre = feats["token_to_center_atom"].long().repeat_interleave(samples, 0)
    p, x, known, residue = whole.gather(1, centre[..., None].expand(-1, -1, 8)).split((3, 3, 1, 1), 2)
    known = known.squeeze(2) * feats["token_pad_mask"].to(pred).repeat_interleave(samples, 0)
    sums = (moments(p, x) * known[..., None, None]).flatten(2)
    inputs = own_shard(x, cp), own_shard(residue.squeeze(2), cp)
    rows = rows_per_block(6 * known.nbytes, known.device)
    return gather_shards(in_blocks(_motions, rows, inputs, (x, residue.squeeze(2), known, sums)), cp, OP)


def _motions(place: Tensor, residue: Tensor, places: Tensor, residues: Tensor, known: Tensor, sums: Tensor) -> Tensor:
    """Rows of tokens (S, r, ...), and all tokens (S, N, ...), to (S, r, 12)."""
    other = (residue[..., None] != residues[:, None]) & (known > 0)[:, None]
    near = other & (distances(place, places) < SURROUNDINGS)
    counted = torch.where(near.sum(2, keepdim=True) < _FEWEST, other, near)
    rotation, shift = rigid_motion((counted.to(sums) @ sums).unflatten(2, (5, 5)))
    return torch.cat([rotation.flatten(2), shift], 2)
