"""Scores that people read, from the logits of the confidence module.

AlphaFold 3, supplement 5.9; ``boltz/model/modules/confidencev2.py`` and ``boltz/model/layers/confidence_utils.py``.
Pairs stay tiles: what crosses ranks is a few numbers for each token and chain.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cpfold_train.kernels.by_rows import in_blocks, rows_per_block
from cpfold_train.model.frames import frame_points
from cpfold_train.model.layers import without_autocast
from cpfold_train.ops.atoms_at import atoms_at
from cpfold_train.ops.attention_pair_bias import all_tokens
from cpfold_train.ops.distances import distances
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce, all_reduce_max
from cpfold_train.spatial import spanning
from cpfold_train.vocabulary import NONPOLYMER, PROTEIN

OP = "confidence_scores"
MAX_ERROR = 32.0
"""Angstrom at which the bins of PAE and PDE end."""
CONTACT = 8.0
CONTACT_BINS = 20
"""Bins of the distogram that lie below ``CONTACT`` Angstrom."""
LIGAND_WEIGHT, INTERFACE_WEIGHT = 20, 10
"""What a ligand's token and one at an interface count in ``complex_iplddt``; others count 1."""


@torch.no_grad()
def confidence_scores(
    logits: dict[str, Tensor],
    x_pred: Tensor,
    pdistogram: Tensor,
    feats: dict[str, Tensor],
    multiplicity: int,
    cp: ContextParallel,
) -> dict[str, Tensor]:
    """All scores of M samples of each complex, in fp32 (or fp64).

    Args:
        logits: what :class:`~cpfold_train.model.confidence.ConfidenceModule` returns.
        x_pred: atom shard (B M, A/P, 3) in Angstrom.
        pdistogram: tile (B, N/R, N/C, 1, bins) of the trunk's logits.
        feats: ``token_to_rep_atom``, ``frames_idx``, ``asym_id``, ``mol_type`` and ``token_pad_mask`` (B, N, ...), the
            same on all ranks. The tokens of a chain are of one type.
        multiplicity: M.
        cp: the running grid.

    Returns:
        ``plddt`` (B M, N), the same on all ranks, and tiles ``pae`` and ``pde`` (B M, N/R, N/C) in Angstrom, all three
        arbitrary at padded tokens; ``complex_plddt``, ``complex_iplddt``, ``complex_pde``, ``complex_ipde``, ``ptm``,
        ``iptm``, ``ligand_iptm`` and ``protein_iptm`` (B M,); ``pair_chains_iptm`` (B M, K, K) by ``asym_id``, where
        [:, a, b] is chain a's score in the frames of chain b.
    """
    with without_autocast(x_pred):
        names = "token_to_rep_atom", "asym_id", "mol_type", "token_pad_mask"
        atom, chain, kind, mask = (feats[name].repeat_interleave(multiplicity, 0) for name in names)
        n = mask.shape[1]
        rows = slice(*cp.grid.row_tokens(n))
        center = atoms_at(x_pred, atom, cp)
        framed = spanning(frame_points(x_pred, center, feats, cp))[:, rows] * mask[:, rows]
        pae, tm = _expected_error_and_tm(logits["pae_logits"], mask)
        pde = expected_value(logits["pde_logits"], MAX_ERROR)
        plddt = expected_value(logits["plddt_logits"], 1.0)

        ligand = kind == NONPOLYMER
        interface = _at_interface(center, chain, mask, ligand, cp)
        weight = mask * torch.where(ligand, LIGAND_WEIGHT, torch.where(interface, INTERFACE_WEIGHT, 1))
        return {
            "plddt": plddt,
            "pae": pae,
            "pde": pde,
            "complex_plddt": (plddt * mask).sum(1) / mask.sum(1),
            "complex_iplddt": (plddt * weight).sum(1) / weight.sum(1),
            **_complex_pde(pde, pdistogram, feats, multiplicity, cp),
            **_tm_scores(tm, framed, chain, kind, mask, cp),
        }


def expected_value(logits: Tensor, end: float) -> Tensor:
    """Mean of the bins' centres, of bins of equal width from 0 to ``end``: (B, r, ..., bins) to (B, r, ...)."""

    def mean(logits: Tensor) -> Tensor:
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return p @ _centres(p, end)

    return in_blocks(mean, _rows_at_once(logits), (logits,), ())


def _centres(p: Tensor, end: float) -> Tensor:
    width = end / p.shape[-1]
    return (torch.arange(p.shape[-1], device=p.device, dtype=p.dtype) + 0.5) * width


def _rows_at_once(logits: Tensor) -> int:
    return rows_per_block(logits[:, :1].numel() * max(4, logits.element_size()), logits.device)


def _expected_error_and_tm(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles (B M, N/R, N/C) of the expected aligned error and of the TM-score's term of each pair."""

    def means(logits: Tensor, count: Tensor) -> Tensor:
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        error = _centres(p, MAX_ERROR)
        scale = 1.24 * (count.clamp(min=19) - 15) ** (1 / 3) - 1.8
        term = 1 / (1 + (error / scale[:, None]).square())
        return torch.stack([p @ error, (p @ term[:, None, :, None]).squeeze(-1)], -1)

    return in_blocks(means, _rows_at_once(logits), (logits,), (mask.sum(1),)).unbind(-1)


def _at_interface(center: Tensor, chain: Tensor, mask: Tensor, ligand: Tensor, cp: ContextParallel) -> Tensor:
    """(B M, N) bool, of tokens of polymers that are in contact with another chain."""

    def touches(x_i: Tensor, chain_i: Tensor, x_j: Tensor, chain_j: Tensor, mask_j: Tensor) -> Tensor:
        other = (chain_i[:, :, None] != chain_j[:, None]) & (mask_j[:, None] > 0)
        return ((distances(x_i, x_j) < CONTACT) & other).any(-1)

    n = mask.shape[1]
    rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
    at_once = rows_per_block(3 * center[:, cols].numel() * center.element_size(), center.device)
    found = in_blocks(
        touches, at_once, (center[:, rows], chain[:, rows]), (center[:, cols], chain[:, cols], mask[:, cols])
    )
    return (all_tokens(all_reduce_max(found.to(mask.dtype), cp, cp.col, OP), cp) > 0) & ~ligand


def _complex_pde(
    pde: Tensor, pdistogram: Tensor, feats: dict[str, Tensor], multiplicity: int, cp: ContextParallel
) -> dict[str, Tensor]:
    """Mean PDE of pairs, and of those between chains, weighted by the trunk's probability that they touch."""

    def contact(logits: Tensor) -> Tensor:
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return p[..., :CONTACT_BINS].sum(-1)

    n = feats["token_pad_mask"].shape[1]
    rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
    position, chain = torch.arange(n, device=pde.device), feats["asym_id"]
    weight = in_blocks(contact, _rows_at_once(pdistogram), (pdistogram[..., 0, :],), ())
    weight = weight * pair_mask(feats["token_pad_mask"], cp.grid) * (position[rows, None] != position[cols])
    between = weight * (chain[:, rows, None] != chain[:, None, cols])
    sums = []
    for w in (weight, between):
        w = w.repeat_interleave(multiplicity, 0)
        sums += [(pde * w).sum((1, 2)), w.sum((1, 2))]
    error, total, error_between, total_between = all_reduce(torch.stack(sums), cp, cp.all, OP)
    return {"complex_pde": error / total, "complex_ipde": error_between / (total_between + 1e-5)}


def _tm_scores(
    tm: Tensor, framed: Tensor, chain: Tensor, kind: Tensor, mask: Tensor, cp: ContextParallel
) -> dict[str, Tensor]:
    """Predicted TM-scores: the best over frames i of the mean over tokens j of a tile's terms (B M, N/R, N/C).

    Args:
        framed: (B M, N/R), 1 where the frame of a row can be trusted.
        chain, kind, mask: (B M, N).
    """
    n = mask.shape[1]
    rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
    chains = one_hot(chain).to(tm.dtype) * mask[..., None].to(tm.dtype)
    # By row and chain of the columns: all scores are sums over chains of these.
    terms = all_reduce(tm @ chains[:, cols], cp, cp.col, OP) * framed[..., None]
    count = chains.sum(1)

    kind_of_chain = [((kind == k).to(tm.dtype)[..., None] * chains).amax(1)[:, None] for k in (NONPOLYMER, PROTEIN)]
    ligand, protein = kind_of_chain
    ligand_i, protein_i = ((kind[:, rows] == k).to(tm.dtype)[..., None] for k in (NONPOLYMER, PROTEIN))
    other = 1 - one_hot(chain[:, rows], chains.shape[2]).to(tm.dtype)
    weights = {
        "ptm": torch.ones_like(other),
        "iptm": other,
        "ligand_iptm": other * (ligand_i * protein + protein_i * ligand),
        "protein_iptm": other * protein_i * protein,
    }
    best = [((terms * w).sum(2) / ((count[:, None] * w).sum(2) + 1e-5)).amax(1) for w in weights.values()]
    best = all_reduce_max(torch.stack(best), cp, cp.row, OP)

    by_chain = terms / (count[:, None] + 1e-5)
    place = chain[:, rows, None].expand_as(by_chain)
    pairs = torch.zeros_like(by_chain[:, :1]).expand(-1, chains.shape[2], -1).clone()
    pairs = all_reduce_max(pairs.scatter_reduce(1, place, by_chain, "amax"), cp, cp.row, OP)
    return {**dict(zip(weights, best)), "pair_chains_iptm": pairs.mT}
