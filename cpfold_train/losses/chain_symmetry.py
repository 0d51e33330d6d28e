"""Which copy of each chain in the ground truth a prediction should be compared to.

AlphaFold-Multimer, section 7.3; AlphaFold 3, supplement 4.2. The package tries up to 100 random permutations. Here the
truth is superposed on the prediction by one chain and one of its copies, and the other chains take the copies that then
lie nearest, the surest first; the best of several such anchors is kept. All of it follows from 25 sums over the atoms
of each chain and copy, so one all-reduce is all that is communicated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.superpose import least_squares, moments, rigid_motion, squared_distances
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce

OP = "symmetry"
ANCHORS = 4
"""Chains, the largest ones, whose every copy is tried as an anchor."""


def choose_copies(pred_coords: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """For each of the S = B*M predictions and each of C chains, the index of its copy: (S, C) int64, on every rank.

    No two chains get the same copy, and a copy with less than half as many resolved atoms as another is no candidate.

    Args:
        pred_coords: (S, A/P, 3), shard of atoms.
        feats: ``copy_coords`` (B, A/P, K, 3) and ``copy_resolved`` (B, A/P, K), shards of atoms, ``atom_to_token``
            (B, A/P); ``chain_copies`` (B, C, K) and ``asym_id`` (B, N), replicated.
        cp: the running grid.
    """
    copies = feats["chain_copies"].long().repeat_interleave(len(pred_coords) // len(feats["chain_copies"]), 0)
    sums = _chain_moments(pred_coords.double(), feats, cp)
    count = sums[..., 0, 0]
    allowed = (copies > 0) & (count >= count.amax(2, keepdim=True) / 2)
    # Itself, whatever of it is resolved.
    allowed[..., 0] = copies[..., 0] > 0

    anchors = count.amax(2).topk(min(ANCHORS, copies.shape[1]), 1).indices[..., None, None, None]
    rotation, shift = rigid_motion(sums.gather(1, anchors.expand(-1, -1, *sums.shape[2:])).flatten(1, 2))
    cost = squared_distances(sums[:, None], rotation[:, :, None, None], shift[:, :, None, None])
    choice, complete = _assign(cost / count.clamp(min=1)[:, None], allowed, copies)

    choice = torch.cat([torch.zeros_like(choice[:, :1]), choice], 1)
    chosen = sums[:, None].expand(-1, choice.shape[1], -1, -1, -1, -1)
    total = chosen.gather(3, choice[..., None, None, None].expand(-1, -1, -1, 1, 5, 5)).sum((2, 3))
    error = least_squares(total) / total[..., 0, 0].clamp(min=1)
    error[:, 1:].masked_fill_(~complete, torch.inf)
    best = error[:, 1:].argmin(1) + 1
    better = clearly_less(error.gather(1, best[:, None]).squeeze(1), error[:, 0])
    return choice[torch.arange(len(choice), device=choice.device), torch.where(better, best, 0)]


def clearly_less(error: Tensor, original: Tensor) -> Tensor:
    """Whether squared Angstrom are less by more than rounding, which depends on the grid; else names stay."""
    return error < original * (1 - 1e-6) - 1e-6


def take_copies(choice: Tensor, feats: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Coordinates (S, A/P, 3) of the chosen copies, and which of the atoms are resolved, (S, A/P)."""
    repeats = len(choice) // len(feats["copy_coords"])
    copy = choice.gather(1, atom_chain(feats).repeat_interleave(repeats, 0))[..., None]
    coords, resolved = (feats[name].repeat_interleave(repeats, 0) for name in ("copy_coords", "copy_resolved"))
    coords = coords.gather(2, copy[..., None].expand(-1, -1, -1, 3)).squeeze(2)
    return coords, resolved.gather(2, copy).squeeze(2)


def atom_chain(feats: dict[str, Tensor]) -> Tensor:
    """(B, A/P) int64 place of each atom's chain among those of the crop."""
    first = feats["chain_copies"][..., 0].long() - 1
    place = (feats["asym_id"].long()[..., None] == first[:, None]).to(torch.uint8).argmax(2)
    return place.gather(1, feats["atom_to_token"].long())


def _chain_moments(pred: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """(S, C, K, 5, 5) sums over each chain's atoms that are resolved in a copy, on every rank."""
    samples, copies = len(pred) // len(feats["asym_id"]), feats["chain_copies"].shape[1:]
    chain = atom_chain(feats).repeat_interleave(samples, 0)
    sums = pred.new_zeros(len(pred) * copies[0], copies[1], 25)
    target = (chain + copies[0] * torch.arange(len(pred), device=pred.device)[:, None]).flatten()
    for k in range(copies[1]):
        truth, known = (feats[name][:, :, k].repeat_interleave(samples, 0) for name in ("copy_coords", "copy_resolved"))
        own = moments(pred, truth.to(pred)) * known[..., None, None]
        sums[:, k].index_add_(0, target, own.flatten(2).flatten(0, 1))
    return all_reduce(sums, cp, cp.all, OP).view(len(pred), *copies, 5, 5)


def _assign(cost: Tensor, allowed: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest pair of a chain and a copy that are both free, again and again.

    Args:
        cost: (S, Q, C, K) of chain and copy under each of Q superpositions.
        allowed: (S, C, K).
        copies: (S, C, K) which copies they are; chains of one entity have the same ones.

    Returns:
        (S, Q, C) choice, and (S, Q) whether there was a copy for every chain.
    """
    cost = cost.masked_fill(~allowed[:, None], torch.inf)
    choice = torch.zeros_like(cost[..., 0], dtype=torch.long)
    left = allowed[..., 0].sum(1)[:, None].expand(cost.shape[:2])
    names = copies[:, None].expand_as(cost)
    row = torch.arange(cost.shape[2], device=cost.device)[:, None]
    for _ in range(cost.shape[2]):
        lowest, pair = cost.flatten(2).min(2)
        chain, copy = pair // cost.shape[3], pair % cost.shape[3]
        found = lowest.isfinite()
        choice = torch.where(found[..., None], choice.scatter(2, chain[..., None], copy[..., None]), choice)
        name = names.flatten(2).gather(2, pair[..., None])[..., None]
        taken = (names == name) | (row == chain[..., None, None])
        cost = cost.masked_fill(taken & found[..., None, None], torch.inf)
        left = left - found.long()
    return choice, left == 0
