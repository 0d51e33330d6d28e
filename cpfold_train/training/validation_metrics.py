"""How well a distogram predicts a structure, computed tile by tile.

All functions work on this rank's tile of one sample, rows r x columns c, and return what is left to combine over the
ranks that share the sample. i and j are global token indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.data.features.tokens import DISTO_BOUNDARIES
from cpfold_train.ops.distances import LDDT_THRESHOLDS

CONTACT = 8.0
"""Distance in Angstrom below which two tokens are in contact."""
LONG_RANGE = 24
"""Sequence separation from which a contact within a chain counts as long-range."""
INCLUSION = 15.0
"""True distance in Angstrom up to which a pair counts in lDDT."""
BOUNDARIES = torch.from_numpy(DISTO_BOUNDARIES)
"""Distances in Angstrom between the distogram's bins."""
_ROWS_AT_A_TIME = 64


def read_distogram(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Expected distance and contact probability.

    Args:
        logits: (r, c, bins).

    Returns:
        (r, c) expected distance in Angstrom, the outer bins taken as one bin's width wide;
        (r, c) probability of the bins whose centre is closer than ``CONTACT``.
    """
    width = BOUNDARIES[1] - BOUNDARIES[0]
    edges = torch.cat([BOUNDARIES[:1] - width, BOUNDARIES, BOUNDARIES[-1:] + width])
    # fp32 at least: a softmax in bf16 would shift the expectation.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    centres = ((edges[1:] + edges[:-1]) / 2).to(logits.device, dtype)
    reads = torch.stack([centres, (centres < CONTACT).to(dtype)], dim=1)
    # The softmax of a whole tile would double the largest tensor of the step.
    parts = [rows.to(dtype).softmax(-1) @ reads for rows in logits.split(_ROWS_AT_A_TIME)]
    return torch.cat(parts).unbind(-1)


def true_distances(
    centre: Tensor, resolved: Tensor, rows: tuple[int, int], cols: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Distances between representative atoms.

    Args:
        centre: (N, 3) representative atoms in Angstrom.
        resolved: (N,) whether they are known.
        rows, cols: half-open intervals of tokens of the tile.

    Returns:
        (r, c) distance in Angstrom; (r, c) bool, both tokens known and different.
    """
    i, j = slice(*rows), slice(*cols)
    distance = (centre[i, None] - centre[None, j]).norm(dim=-1)
    known = resolved.bool()
    index = torch.arange(len(centre), device=centre.device)
    return distance, known[i, None] & known[None, j] & (index[i, None] != index[None, j])


def lddt_parts(predicted: Tensor, distance: Tensor, valid: Tensor) -> Tensor:
    """(2,): fraction of the thresholds that each pair's error is below, summed over the pairs, and their number."""
    included = valid & (distance < INCLUSION)
    error = (predicted - distance).abs()
    score = sum((error < t).to(error.dtype) for t in LDDT_THRESHOLDS) / len(LDDT_THRESHOLDS)
    return torch.stack([(score * included).sum(), included.sum().to(error.dtype)])


def long_range(asym_id: Tensor, residue_index: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """(r, c) bool: i < j, and in different chains or at least ``LONG_RANGE`` residues apart."""
    i, j = slice(*rows), slice(*cols)
    index = torch.arange(len(asym_id), device=asym_id.device)
    apart = (residue_index[i, None] - residue_index[None, j]).abs() >= LONG_RANGE
    return (index[i, None] < index[None, j]) & (apart | (asym_id[i, None] != asym_id[None, j]))


def contact_candidates(
    probability: Tensor, distance: Tensor, valid: Tensor, top: int, rows: tuple[int, int], cols: tuple[int, int], n: int
) -> Tensor:
    """(top, 2): the likeliest contacts of the tile, as probability and whether it is one; (-1, 0) fills the rest.

    Copies of a chain get the same probabilities up to rounding, which differs between grids. So these are compared to
    six digits, and of equal ones the first of the n x n pairs counts.
    """
    i, j = (torch.arange(*interval, device=probability.device, dtype=torch.float64) for interval in (rows, cols))
    ranked = probability.double().round(decimals=6) - 1e-7 * (i[:, None] * n + j) / n**2
    ranked = ranked.masked_fill(~valid, -1.0).flatten()
    best, index = ranked.topk(min(top, ranked.numel()))
    true = (distance.flatten()[index] < CONTACT) & (best > -1)
    candidates = torch.stack([best, true.to(best.dtype)], dim=1)
    fill = candidates.new_tensor([-1.0, 0.0]).expand(top - len(candidates), 2)
    return torch.cat([candidates, fill])


def precision(candidates: Tensor, top: int) -> Tensor:
    """Fraction of true contacts among the ``top`` likeliest of (n, 2) candidates of all tiles; not a number where there
    are none."""
    best, index = candidates[:, 0].topk(min(top, len(candidates)))
    taken = best > -1
    return (candidates[index, 1] * taken).sum() / taken.sum()
