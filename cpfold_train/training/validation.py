"""What validation measures of each sample, tile by tile, without mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpfold_train.losses.symmetry import matched_truth
from cpfold_train.model.layers import without_autocast
from cpfold_train.ops.atoms_at import atoms_at
from cpfold_train.parallel.context import ContextParallel, to_local
from cpfold_train.parallel.gather import gather_tensor
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.training import validation_metrics as metrics

OP = "metrics"


def score_distances(pdistogram: DTensor, feats: dict[str, Tensor | DTensor], cp: ContextParallel) -> Tensor:
    """(B, 2): precision of the top L long-range contacts and lDDT of the distances that the distogram gives.

    L is the sample's number of resolved tokens. A score is not a number where the sample has no pair for it. The result
    is the same on all ranks of the replica.
    """
    with without_autocast(pdistogram):
        logits, feats = pdistogram.to_local().squeeze(3), to_local(feats)
        n = pdistogram.shape[1]
        rows, cols = cp.grid.row_tokens(n), cp.grid.col_tokens(n)
        centre, resolved, asym_id, residue_index = (
            feats[name] for name in ("disto_center", "token_disto_mask", "asym_id", "residue_index")
        )
        scores = []
        for b in range(len(logits)):
            expected, contact = metrics.read_distogram(logits[b])
            distance, valid = metrics.true_distances(centre[b], resolved[b], rows, cols)
            hits, pairs = all_reduce(metrics.lddt_parts(expected, distance, valid), cp, cp.all, OP)
            top = int(resolved[b].sum())
            far = valid & metrics.long_range(asym_id[b], residue_index[b], rows, cols)
            candidates = gather_tensor(metrics.contact_candidates(contact, distance, far, top, rows, cols, n), cp.all)
            precision = metrics.precision(candidates.flatten(0, 1), top).to(hits.dtype)
            scores.append(torch.stack([precision, hits / pairs]))
        return torch.stack(scores)


def score_structures(coords: Tensor, feats: dict[str, Tensor | DTensor], cp: ContextParallel) -> Tensor:
    """(B,): lDDT of one sampled structure of each sample, of its tokens' representative atoms, whose symmetric chains
    and atoms may be named either way; not a number where it has no pair of resolved ones.

    Args:
        coords: (B, A/P, 3) in Angstrom, this rank's atoms.
        feats: what the trunk was given.
        cp: the running grid.
    """
    with without_autocast(coords):
        feats = to_local(feats)
        truth, known = matched_truth(coords, feats, cp)
        both = torch.cat([coords, truth, known[..., None].to(coords)], 2)
        predicted, truth, known = atoms_at(both, feats["token_to_rep_atom"], cp).split((3, 3, 1), 2)
        known = known.squeeze(2) * feats["token_pad_mask"]
        n = predicted.shape[1]
        rows, cols = cp.grid.row_tokens(n), cp.grid.col_tokens(n)
        scores = []
        for b in range(len(predicted)):
            distance, valid = metrics.true_distances(truth[b], known[b], rows, cols)
            apart = torch.cdist(predicted[b, slice(*rows)], predicted[b, slice(*cols)])
            hits, pairs = all_reduce(metrics.lddt_parts(apart, distance.to(apart), valid), cp, cp.all, OP)
            scores.append(hits / pairs)
        return torch.stack(scores)
