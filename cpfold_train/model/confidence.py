"""The confidence module: how sure the model is of a structure that it has sampled.

AlphaFold 3, Algorithm 31, as Boltz-2 runs it (``boltz/model/modules/confidencev2.py``) with the settings of its
release: confidence of tokens and not of atoms, separate heads for pairs within a chain and between chains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.model.config import ConfidenceConfig, MemoryConfig, ModelConfig
from cpfold_train.model.embedding import ContactConditioning, RelativePositionEncoder
from cpfold_train.model.layers import linear, without_autocast
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.ops.atoms_at import atoms_at
from cpfold_train.ops.distances import distances
from cpfold_train.ops.transpose import transpose
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.vocabulary import NUM_BOND_TYPES


class ConfidenceHeads(nn.Module):
    """Logits over bins of the lDDT of tokens, of whether they are resolved, and of the errors of pairs."""

    def __init__(self, token_s: int, token_z: int, config: ConfidenceConfig) -> None:
        super().__init__()
        self.to_pae_intra_logits = linear(token_z, config.num_pae_bins, "default")
        self.to_pae_inter_logits = linear(token_z, config.num_pae_bins, "default")
        self.to_pde_intra_logits = linear(token_z, config.num_pde_bins, "default")
        self.to_pde_inter_logits = linear(token_z, config.num_pde_bins, "default")
        self.to_plddt_logits = linear(token_s, config.num_plddt_bins, "default")
        self.to_resolved_logits = linear(token_s, 2, "default")

    def forward(self, s: Tensor, z: Tensor, asym_id: Tensor, cp: ContextParallel) -> dict[str, Tensor]:
        """All logits, from s (B, N, token_s) and a tile of z (B, N/R, N/C, token_z); ``asym_id`` is (B, N)."""
        pae = self.to_pae_intra_logits.weight, self.to_pae_inter_logits.weight
        pde = self.to_pde_intra_logits.weight, self.to_pde_inter_logits.weight
        return {
            "plddt_logits": self.to_plddt_logits(s),
            "resolved_logits": self.to_resolved_logits(s),
            "pae_logits": _by_chains(z, asym_id, *pae, cp),
            "pde_logits": _by_chains(z + transpose(z, cp), asym_id, *pde, cp),
        }


def _by_chains(z: Tensor, asym_id: Tensor, intra: Tensor, inter: Tensor, cp: ContextParallel) -> Tensor:
    """Tile (B, N/R, N/C, bins): one projection of z for pairs of one chain, another for those of two."""

    def project(z: Tensor, chain_i: Tensor, chain_j: Tensor, intra: Tensor, inter: Tensor) -> Tensor:
        within, between = F.linear(z, torch.cat([intra, inter])).chunk(2, -1)
        return torch.where((chain_i[:, :, None] == chain_j[:, None])[..., None], within, between)

    n = asym_id.shape[1]
    rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
    row_bytes = z[:, :1, :, 0].numel() * 2 * intra.shape[0] * z.element_size()
    at_once = rows_per_block(row_bytes, z.device)
    return by_rows(project, at_once, (z, asym_id[:, rows]), (asym_id[:, cols], intra, inter))


class ConfidenceModule(nn.Module):
    """A Pairformer over the trunk's representations and the distances in a sampled structure, and the heads.

    Args:
        config: sizes of the model.
        memory: what is kept for the backward pass.
    """

    boundaries: Tensor

    def __init__(self, config: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        token_s, token_z, own = config.token_s, config.token_z, config.confidence
        self.register_buffer("boundaries", torch.linspace(2, own.max_dist, own.num_dist_bins - 1))
        self.dist_bin_pairwise_embed = nn.Embedding(own.num_dist_bins, token_z)
        nn.init.zeros_(self.dist_bin_pairwise_embed.weight)
        self.s_to_z = linear(token_s, token_z, "zero")
        self.s_to_z_transpose = linear(token_s, token_z, "zero")
        self.s_to_z_prod_in1 = linear(token_s, token_z, "default")
        self.s_to_z_prod_in2 = linear(token_s, token_z, "default")
        self.s_to_z_prod_out = linear(token_z, token_z, "zero")
        self.s_inputs_norm = nn.LayerNorm(token_s)
        self.s_norm = nn.LayerNorm(token_s)
        self.z_norm = nn.LayerNorm(token_z)
        self.s_input_to_s = linear(token_s, token_s, "zero")
        self.rel_pos = RelativePositionEncoder(token_z)
        self.token_bonds = linear(1, token_z, "default")
        self.token_bonds_type = nn.Embedding(NUM_BOND_TYPES + 1, token_z)
        self.contact_conditioning = ContactConditioning(token_z)
        self.pairformer_stack = PairformerModule(token_s, token_z, own.pairformer, memory)
        self.confidence_heads = ConfidenceHeads(token_s, token_z, own)

    def forward(
        self,
        s_inputs: Tensor,
        s: Tensor,
        z: Tensor,
        x_pred: Tensor,
        feats: dict[str, Tensor],
        multiplicity: int,
        cp: ContextParallel,
        draws: RandomStreams | None,
    ) -> dict[str, Tensor]:
        """Logits of M samples of each complex, stacked as ``repeat_interleave(M, 0)``; or of some of them at a time.

        No gradient flows to ``x_pred``: it is seen as bins of distances. Boltz-2 is trained with none to s_inputs, s
        and z either, for which the caller must detach them.

        Args:
            s_inputs, s: (B, N, token_s), the same on all ranks.
            z: pair tile (B, N/R, N/C, token_z).
            x_pred: atom shard (B M, A/P, 3) in Angstrom.
            feats: ``token_to_rep_atom``, ``asym_id``, ``token_pad_mask`` and what the relative positions read (B, N);
                the tiles ``token_bonds``, ``type_bonds``, ``contact_conditioning`` and ``contact_threshold``.
            multiplicity: M.
            cp: the running grid.
            draws: dropout of the B complexes; None in evaluation.

        Returns:
            ``plddt_logits`` (B M, N, bins) and ``resolved_logits`` (B M, N, 2), the same on all ranks; ``pae_logits``
            and ``pde_logits``, tiles (B M, N/R, N/C, bins).
        """
        s_inputs = self.s_inputs_norm(s_inputs)
        s = self.s_norm(s) + self.s_input_to_s(s_inputs)
        z = self._embed_pairs(s_inputs, z, feats, cp).to(z.dtype)
        per_sample = {
            name: feats[name].repeat_interleave(multiplicity, 0)
            for name in ("token_to_rep_atom", "token_pad_mask", "asym_id")
        }
        s, z = s.repeat_interleave(multiplicity, 0), z.repeat_interleave(multiplicity, 0)
        with without_autocast(x_pred):
            center = atoms_at(x_pred.detach(), per_sample["token_to_rep_atom"], cp)
            z = self._add_distances(z, center, cp)
        draws = None if draws is None else draws.at("confidence_module").copies(multiplicity)
        s, z = self.pairformer_stack(s, z, per_sample["token_pad_mask"], cp, draws)
        return self.confidence_heads(s, z, per_sample["asym_id"], cp)

    def _embed_pairs(self, s_inputs: Tensor, z: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """What is the same for all samples of a complex: tile (B, N/R, N/C, token_z); s_inputs are normed."""

        def add_products(z: Tensor, sum_i: Tensor, in1: Tensor, sum_j: Tensor, in2: Tensor, out: Tensor) -> Tensor:
            return z + sum_i[:, :, None] + sum_j[:, None] + F.linear(in1[:, :, None] * in2[:, None], out)

        z = self.z_norm(z) + self.rel_pos(feats, cp)
        z = z + self.token_bonds(feats["token_bonds"].to(self.token_bonds.weight.dtype))
        z = z + self.token_bonds_type(feats["type_bonds"].long()) + self.contact_conditioning(feats)
        n = s_inputs.shape[1]
        s_i, s_j = s_inputs[:, slice(*cp.grid.row_tokens(n))], s_inputs[:, slice(*cp.grid.col_tokens(n))]
        of_rows = z, self.s_to_z(s_i), self.s_to_z_prod_in1(s_i)
        of_cols = self.s_to_z_transpose(s_j), self.s_to_z_prod_in2(s_j), self.s_to_z_prod_out.weight
        return by_rows(add_products, rows_per_block(z[:, :1].numel() * z.element_size(), z.device), of_rows, of_cols)

    def _add_distances(self, z: Tensor, center: Tensor, cp: ContextParallel) -> Tensor:
        """z with the embedded distances between ``center`` (B M, N, 3)."""

        def add(z: Tensor, x_i: Tensor, x_j: Tensor, boundaries: Tensor, weight: Tensor) -> Tensor:
            return z + F.embedding(torch.bucketize(distances(x_i, x_j), boundaries), weight).to(z.dtype)

        n = center.shape[1]
        x_i, x_j = center[:, slice(*cp.grid.row_tokens(n))], center[:, slice(*cp.grid.col_tokens(n))]
        rows = rows_per_block(z[:, :1].numel() * z.element_size(), z.device)
        return by_rows(add, rows, (z, x_i), (x_j, self.boundaries, self.dist_bin_pairwise_embed.weight))
