"""Losses of the confidence heads (AlphaFold 3, supplement 4.3; ``boltz/model/loss/confidencev2.py``), token by token.

Targets are errors of predicted structures, without gradient: each rank computes those of its shard of the tokens or of
its tile, a few rows at a time. Coordinates, 3 numbers an atom, are gathered.

Every function returns This rank's part of each sample's loss, (B*M,): the sum over the ranks is the loss. It is
computed in fp32 (or fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import by_rows, in_blocks, rows_per_block
from cpfold_train.losses.geometry import frame_axes
from cpfold_train.model.frames import token_frames
from cpfold_train.ops.distances import LDDT_THRESHOLDS, distances
from cpfold_train.ops.shards import gather_shards, own_shard
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.spatial import spanning
from cpfold_train.vocabulary import DNA, NONPOLYMER, RNA

OP = "confidence_loss"
MAX_DISTANCE = 32.0
"""Angstrom: errors of pairs beyond it are in the last bin."""


@dataclass(frozen=True)
class ConfidenceTargets:
    """Predicted structures and the truth that they are measured by, whole on every rank.

    Attributes:
        pred: (B*M, A, 3) predicted coordinates in Angstrom.
        truth: (B*M, A, 3) true ones.
        resolved: (B*M, A) bool.
    """

    pred: Tensor
    truth: Tensor
    resolved: Tensor

    def at(self, atom: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted and true coordinates and whether resolved, (B*M, n, ...), of atoms (B*M, n)."""
        places = atom[..., None].expand(-1, -1, 3)
        return self.pred.gather(1, places), self.truth.gather(1, places), self.resolved.gather(1, atom)


def confidence_targets(
    pred_coords: Tensor, true_coords: Tensor, true_coords_resolved_mask: Tensor, cp: ContextParallel
) -> ConfidenceTargets:
    """Gather what the losses compare.

    Args:
        pred_coords: (B*M, A/P, 3), shard of atoms.
        true_coords: (B*M, A/P, 3); each prediction may have a truth of its own, its symmetric chains permuted.
        true_coords_resolved_mask: (B*M, A/P).
        cp: the running grid.
    """
    dtype = torch.promote_types(pred_coords.dtype, torch.float32)
    parts = pred_coords.detach().to(dtype), true_coords.to(dtype), true_coords_resolved_mask[..., None].to(dtype)
    pred, truth, resolved = gather_shards(torch.cat(parts, 2), cp, OP).split((3, 3, 1), 2)
    return ConfidenceTargets(pred, truth, resolved.squeeze(2) > 0)


def plddt_loss(pred_lddt: Tensor, targets: ConfidenceTargets, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """Cross-entropy of the lDDT of each token's representative atom to the resolved residues' centres around it.

    Args:
        pred_lddt: logits (B*M, N, bins), replicated.
        targets: what :func:`confidence_targets` returns.
        feats: ``token_to_rep_atom``, ``token_to_center_atom``, ``token_resolved_mask``, ``mol_type`` and
            ``token_pad_mask`` (B, N), replicated.
        cp: the running grid.
    """
    rep, centre, mol_type, centre_known, real = _repeated(
        targets, feats, "token_to_rep_atom token_to_center_atom mol_type token_resolved_mask token_pad_mask"
    )
    pred, truth, known = targets.at(rep)
    known &= real > 0
    centre_pred, centre_truth, resolved = targets.at(centre)
    partner = resolved & (centre_known > 0) & (mol_type != NONPOLYMER)
    cutoff = torch.where((mol_type == DNA) | (mol_type == RNA), 30.0, 15.0).to(pred)
    rows = rows_per_block(8 * cutoff.nbytes, pred.device)
    inputs = [own_shard(x, cp) for x in (pred, truth, rep)]
    shared = centre_pred, centre_truth, centre, partner, cutoff
    target = in_blocks(partial(_lddt_bins, bins=pred_lddt.shape[2]), rows, inputs, shared)

    mask = own_shard(known, cp) * (target >= 0).to(pred)
    errors = _cross_entropy(own_shard(pred_lddt, cp), target.clamp(min=0))
    return (errors * mask).sum(1) / (1e-7 + all_reduce(mask.sum(1), cp, cp.all, OP))


def resolved_loss(
    pred_resolved: Tensor, targets: ConfidenceTargets, feats: dict[str, Tensor], cp: ContextParallel
) -> Tensor:
    """Cross-entropy of whether each token's representative atom is resolved, over all tokens.

    Args:
        pred_resolved: logits (B*M, N, 2), replicated; the first is of resolved ones.
        targets: what :func:`confidence_targets` returns.
        feats: ``token_to_rep_atom`` and ``token_pad_mask`` (B, N), replicated.
        cp: the running grid.
    """
    rep, real = _repeated(targets, feats, "token_to_rep_atom token_pad_mask")
    target = (~targets.resolved.gather(1, rep)).long()
    errors = _cross_entropy(own_shard(pred_resolved, cp), own_shard(target, cp))
    return (errors * own_shard(real, cp)).sum(1) / (1e-7 + real.sum(1))


def pde_loss(pred_pde: Tensor, targets: ConfidenceTargets, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """Cross-entropy of the errors of the distances between representative atoms, over all ordered pairs of resolved
    ones, with themselves too.

    Args:
        pred_pde: logits (B*M, N/R, N/C, bins), tile.
        targets: what :func:`confidence_targets` returns.
        feats: ``token_to_rep_atom`` and ``token_pad_mask`` (B, N), replicated.
        cp: the running grid.
    """
    rep, real = _repeated(targets, feats, "token_to_rep_atom token_pad_mask")
    pred, truth, known = targets.at(rep)
    known = (known & (real > 0)).to(pred)
    rows, columns = _tile_tokens(rep.shape[1], cp)
    inputs = pred_pde, *(x[:, rows] for x in (pred, truth, known))
    shared = [x[:, columns] for x in (pred, truth, known)]
    errors = by_rows(_pde_of_rows, _rows_at_once(pred_pde, pred), inputs, shared).sum(1)
    return errors / (1e-7 + known.sum(1).square())


def pae_loss(pred_pae: Tensor, targets: ConfidenceTargets, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """Cross-entropy of the error of each token's place as seen from each token's frame.

    Over all pairs of a token whose frame is resolved and not in a line, in truth and in the prediction, and a token
    whose place is resolved. The place is the frame's origin.

    Args:
        pred_pae: logits (B*M, N/R, N/C, bins), tile; frames are rows.
        targets: what :func:`confidence_targets` returns.
        feats: ``frames_idx`` (B, N, 3), ``token_to_rep_atom``, ``asym_id``, ``mol_type`` and ``token_pad_mask`` (B, N),
            replicated.
        cp: the running grid.
    """
    (real,) = _repeated(targets, feats, "token_pad_mask")
    rows, columns = _tile_tokens(real.shape[1], cp)
    spans, frames_i, origins_j = real > 0, [], []
    for coords in (targets.truth, targets.pred):
        frames = token_frames(coords, targets.resolved, feats, cp, OP)
        points = coords.gather(1, frames.flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, frames.shape[1:])
        if not origins_j:
            resolved = targets.resolved.gather(1, frames.flatten(1)).view_as(frames)
            spans, known = spans & resolved.all(2), (resolved[..., 1] & (real > 0)).to(coords)
        spans = spans & spanning(points)
        origins = points[..., 1, :]
        frames_i.append(_Frames(frame_axes(points[:, rows]), origins[:, rows]))
        origins_j.append(origins[:, columns])
    spans = spans.to(known)
    inputs = pred_pae, *frames_i, spans[:, rows]
    errors = by_rows(_pae_of_rows, _rows_at_once(pred_pae, real), inputs, (*origins_j, known[:, columns])).sum(1)
    return errors / (1e-7 + spans.sum(1) * known.sum(1))


def _repeated(targets: ConfidenceTargets, feats: dict[str, Tensor], names: str) -> list[Tensor]:
    """Features (B, N) for each sample, (B*M, N): whole numbers as int64, masks as the coordinates' dtype."""
    found = (feats[name].repeat_interleave(len(targets.pred) // len(feats[name]), 0) for name in names.split())
    return [x.to(targets.pred) if x.is_floating_point() else x.long() for x in found]


def _tile_tokens(n: int, cp: ContextParallel) -> tuple[slice, slice]:
    return slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))


def _rows_at_once(logits: Tensor, like: Tensor) -> int:
    return rows_per_block(logits[:, :1].numel() * like.element_size(), logits.device)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of logits (..., bins) and indices (...)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


def _bins(error: Tensor, bins: int) -> Tensor:
    return (error * bins / MAX_DISTANCE).long().clamp(max=bins - 1)


def _lddt_bins(
    pred: Tensor,
    truth: Tensor,
    atom: Tensor,
    preds: Tensor,
    truths: Tensor,
    atoms: Tensor,
    partner: Tensor,
    cutoff: Tensor,
    bins: int,
) -> Tensor:
    """Rows of atoms (S, r, ...) and all their possible partners (S, N, ...) to the bin of each row's lDDT (S, r), -1
    where it has no partner."""
    true_distance = distances(truth, truths)
    error = (true_distance - distances(pred, preds)).abs()
    scored = (true_distance < cutoff[:, None]) & partner[:, None] & (atom[..., None] != atoms[:, None])
    kept = sum(((error < threshold) & scored).sum(2) for threshold in LDDT_THRESHOLDS)
    pairs = scored.sum(2)
    # In whole numbers, so that a score on a boundary is in the same bin in every precision.
    return torch.where(pairs > 0, (bins * kept // (len(LDDT_THRESHOLDS) * pairs.clamp(min=1))).clamp(max=bins - 1), -1)


def _pde_of_rows(
    logits: Tensor, pred: Tensor, truth: Tensor, known: Tensor, preds: Tensor, truths: Tensor, knowns: Tensor
) -> Tensor:
    """Rows (S, r, N/C, bins) and (S, r, ...), columns (S, N/C, ...), to sums of masked cross-entropies (S, r)."""
    error = (distances(truth, truths) - distances(pred, preds)).abs()
    mask = known[..., None] * knowns[:, None]
    return (_cross_entropy(logits, _bins(error, logits.shape[-1])) * mask).sum(2)


class _Frames(NamedTuple):
    """Axes (S, r, 3, 3) and origins (S, r, 3)."""

    axes: Tensor
    origin: Tensor


def _pae_of_rows(
    logits: Tensor, truth: _Frames, pred: _Frames, spans: Tensor, truths: Tensor, preds: Tensor, known: Tensor
) -> Tensor:
    """As :func:`_pde_of_rows`, with the frames of the rows and the origins (S, N/C, 3) of the columns."""
    square = 1e-8
    for axis in range(3):
        apart = 0
        for x in range(3):
            apart = apart + truth.axes[..., axis, x, None] * (truths[:, None, :, x] - truth.origin[..., x, None])
            apart = apart - pred.axes[..., axis, x, None] * (preds[:, None, :, x] - pred.origin[..., x, None])
        square = square + apart.square()
    mask = spans[..., None] * known[:, None]
    return (_cross_entropy(logits, _bins(square.sqrt(), logits.shape[-1])) * mask).sum(2)
