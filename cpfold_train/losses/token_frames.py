"""Which three atoms span the frame of each token, given coordinates (AlphaFold 3, supplement 4.3.2).

``compute_frame_pred`` of ``boltz/model/layers/confidence_utils.py``: a polymer's residue has its backbone's frame, an
atom of a ligand that of the two atoms nearest to it in its chain, which coordinates decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import in_blocks, rows_per_block
from cpfold_train.ops.distances import distances
from cpfold_train.ops.shares import gather_shares, own_share
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.vocabulary import NONPOLYMER

_BIG = 1e9
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
        (S, N, 3) int64 atoms, on every rank; each rank finds those of its share of the tokens.
    """
    samples = len(coords) // len(feats["asym_id"])
    # An atom of a ligand is a token of its own. Padding and polymers are in no ligand's chain.
    ligand = (feats["mol_type"] == NONPOLYMER) & (feats["token_pad_mask"] > 0)
    chain = torch.where(ligand, feats["asym_id"].long(), -1)
    atom, chain, fixed = (
        x.long().repeat_interleave(samples, 0) for x in (feats["token_to_rep_atom"], chain, feats["frames_idx"])
    )
    place = coords.gather(1, atom[..., None].expand(-1, -1, 3))
    known = resolved.gather(1, atom) > 0
    token = torch.arange(atom.shape[1], device=atom.device).expand_as(atom)
    rows = rows_per_block(6 * place[..., 0].nbytes, place.device)
    inputs = [own_share(x, cp) for x in (place, chain, token, fixed)]
    return gather_shares(in_blocks(_frames, rows, inputs, (place, chain, known, atom)), cp, op)


def _frames(
    place: Tensor,
    chain: Tensor,
    token: Tensor,
    fixed: Tensor,
    places: Tensor,
    chains: Tensor,
    known: Tensor,
    atom: Tensor,
) -> Tensor:
    """Frames of rows of tokens: (S, r, ...) of the rows and (S, N, ...) of all tokens to (S, r, 3)."""
    same = (chain[..., None] == chains[:, None]) & (chain >= 0)[..., None]
    apart = distances(place, places)
    apart = torch.where(same & known[:, None], apart, 2 * _BIG)
    # Whether or not it is resolved, an atom is the origin of its own frame.
    apart = apart.scatter(2, token[..., None], -1.0).masked_fill(~same, 4 * _BIG)
    nearest = apart.topk(min(3, apart.shape[2]), dim=2, largest=False).indices
    # Not by a list of places, which would be copied to the device, and waited for.
    nearest = torch.cat([nearest[..., 1:2], nearest[..., :1], nearest[..., 2:]], 2)
    found = atom.gather(1, nearest.flatten(1)).view_as(nearest)
    return torch.where((same.sum(2) >= 3)[..., None], found, fixed)
