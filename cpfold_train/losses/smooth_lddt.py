"""Smooth lDDT loss (AlphaFold 3, Algorithm 27; ``boltz/model/loss/diffusionv2.py``), pair by pair of near atoms.

Only pairs that are near in the ground truth count, a few hundred an atom, and they are the same for all diffusion
samples of a sample. So pairs are looked for once a sample, a few rows of the A x A distances at a time, and the rest is
done for those found. The rows go to the ranks round-robin: nucleotides, which reach twice as far, lie together, and so
does padding. With kernels for GPUs one of these does all that for fp32 without looking for pairs at all
(:mod:`cpfold_train.kernels.smooth_lddt`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpfold_train.dry_run import each_block
from cpfold_train.kernels.by_rows import rows_per_block
from cpfold_train.kernels.smooth_lddt import smooth_lddt
from cpfold_train.ops.distances import LDDT_THRESHOLDS, distances
from cpfold_train.ops.shards import gather_shards
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.vocabulary import DNA, RNA

OP = "smooth_lddt"


def smooth_lddt_loss(
    pred_coords: Tensor,
    feats: dict[str, Tensor],
    cp: ContextParallel,
    nucleic_acid_cutoff: float = 30.0,
    other_cutoff: float = 15.0,
) -> Tensor:
    """This rank's part of each diffusion sample's loss; the sum over the ranks is the loss.

    Over all ordered pairs of two different resolved atoms whose true distance is below the cutoff of the first; as in
    the package, predicted distances have 1e-6 added to each component. Computed in fp32 (or fp64).

    Args:
        pred_coords: (B*M, A/P, 3) in Angstrom, shard of atoms.
        feats: ``coords`` (B, A/P, 3), ``atom_resolved_mask`` and ``atom_to_token`` (B, A/P), shards of atoms, and
            ``mol_type`` (B, N), replicated.
        cp: the running grid.
        nucleic_acid_cutoff: reach of atoms of DNA and RNA, in Angstrom.
        other_cutoff: reach of all others.

    Returns:
        (B*M,).
    """
    dtype = torch.promote_types(pred_coords.dtype, torch.float32)
    mol_type = feats["mol_type"].gather(1, feats["atom_to_token"].long())
    nucleic = (mol_type == DNA) | (mol_type == RNA)
    reach = torch.where(nucleic, nucleic_acid_cutoff, other_cutoff) * feats["atom_resolved_mask"]
    # Each atom's place and reach, which is zero where the atom does not count, in one message.
    truth = gather_shards(torch.cat([feats["coords"], reach[..., None]], 2).to(dtype), cp, OP)
    pred = gather_shards(pred_coords.to(dtype), cp, OP)
    if cp.kernels != "torch" and dtype == torch.float32:
        sums, pairs, _ = smooth_lddt(pred, truth, cp.all.index, cp.all.size)
    else:
        sums, pairs = _SmoothLDDT.apply(pred, truth, cp.all.index, cp.all.size)
    pairs = all_reduce(pairs, cp, cp.all, OP).repeat_interleave(len(pred) // len(truth))
    return 1 / cp.all.size - sums / (pairs + 1e-5)


class _SmoothLDDT(torch.autograd.Function):
    """Sums of scores (B*M,) and numbers of pairs (B,) of the rows ``first``, ``first + step``, ...

    Of a score per sample, the gradient is known in the forward pass up to a factor: nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, pred: Tensor, truth: Tensor, first: int, step: int) -> tuple[Tensor, Tensor]:
        samples = len(pred) // len(truth)
        sums, pairs = pred.new_zeros(len(pred)), pred.new_zeros(len(truth))
        # Atoms first and samples last: what is fetched for an atom lies together.
        grad = torch.zeros_like(pred.permute(1, 2, 0)) if ctx.needs_input_grad[0] else None
        for b in range(len(truth)):
            own = slice(b * samples, (b + 1) * samples)
            coords = pred[own].permute(1, 2, 0).contiguous()
            slopes = None if grad is None else torch.zeros_like(coords)
            for i, j, distance in _near_pairs(truth[b], first, step):
                pairs[b] += len(i)
                at_once = rows_per_block(4 * coords[0].nbytes, coords.device)
                for part in zip(i.split(at_once), j.split(at_once), distance.split(at_once)):
                    sums[own] += _scores(coords, *part, slopes)
            if grad is not None:
                grad[..., own] = slopes
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(pairs)
        return sums, pairs

    @staticmethod
    def backward(ctx, grad_sums: Tensor, _) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_sums).permute(2, 0, 1).contiguous(), None, None, None


def _near_pairs(truth: Tensor, first: int, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs (i, j) that count and their true distances, (K,) each, a few rows i at a time.

    Args:
        truth: (A, 4) coordinates and reach of all atoms; one with no reach is no partner either.
    """
    coords, reach = truth[:, :3], truth[:, 3]
    atom = torch.arange(len(truth), device=truth.device)
    rows = atom[first::step]
    for i in each_block(rows.split(rows_per_block(3 * reach.nbytes, truth.device)), len):
        distance = distances(coords[i], coords)
        near = (distance < reach[i, None]) & (reach > 0) & (i[:, None] != atom)
        row, j = near.nonzero(as_tuple=True)
        yield i[row], j, distance[row, j]


def _scores(coords: Tensor, i: Tensor, j: Tensor, distance: Tensor, slopes: Tensor | None) -> Tensor:
    """Sum of the pairs' scores in each sample (M,); adds their gradients to ``slopes``.

    Args:
        coords, slopes: (A, 3, M).
        i, j, distance: (K,).
    """
    apart = coords[i] - coords[j] + 1e-6
    length = apart.square().sum(1).sqrt()
    error = length - distance[:, None]
    size = error.abs()
    score, slope = torch.zeros_like(size), torch.zeros_like(size)
    for threshold in LDDT_THRESHOLDS:
        # The derivative of sigmoid(t - e) by e is -s (1 - s).
        inside = torch.sigmoid(threshold - size)
        score += inside
        slope += inside * (inside - 1)
    if slopes is not None:
        # d score / d apart: through |error|, through the length, along the vector; the mean is over the thresholds.
        slope *= error.sign() / (len(LDDT_THRESHOLDS) * length)
        apart *= slope[:, None]
        slopes.index_add_(0, i, apart)
        slopes.index_add_(0, j, apart, alpha=-1)
    return score.sum(0) / len(LDDT_THRESHOLDS)
