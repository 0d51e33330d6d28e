"""From features to the first single and pair representations.

Boltz-2's names and arithmetic: ``boltz/model/modules/trunkv2.py`` (InputEmbedder, ContactConditioning) and
``encodersv2.py`` (RelativePositionEncoder, FourierEmbedding).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.functional import linear as linear_of

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.model.atom_attention import AtomAttentionEncoder
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.model.layers import linear, normed_linear
from cpfold_train.ops.points import linear_of_points
from cpfold_train.ops.shards import gather_shards
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.vocabulary import NUM_METHODS, NUM_MOLECULE_TYPES, NUM_TOKENS


class InputEmbedder(nn.Module):
    """s_inputs from what is known of each token and of its atoms (AlphaFold 3, Algorithm 2).

    The atoms are sharded; what concerns tokens every rank computes for all of them.
    """

    def __init__(self, atoms: AtomConfig, token_s: int, token_z: int, memory: MemoryConfig) -> None:
        super().__init__()
        self.atom_encoder = AtomEncoder(atoms, token_s, token_z, structure_prediction=False)
        heads = atoms.atom_encoder_depth * atoms.atom_encoder_heads
        self.atom_enc_proj_z = nn.Sequential(nn.LayerNorm(atoms.atom_z), linear(atoms.atom_z, heads, "default"))
        self.atom_attention_encoder = AtomAttentionEncoder(atoms, token_s, False, memory)
        self.res_type_encoding = linear(NUM_TOKENS, token_s, "default")
        self.msa_profile_encoding = linear(NUM_TOKENS + 1, token_s, "default")
        self.method_conditioning_init = nn.Embedding(NUM_METHODS, token_s)
        self.modified_conditioning_init = nn.Embedding(2, token_s)
        self.cyclic_conditioning_init = linear(1, token_s, "zero")
        self.mol_type_conditioning_init = nn.Embedding(NUM_MOLECULE_TYPES, token_s)
        for table in (self.method_conditioning_init, self.modified_conditioning_init, self.mol_type_conditioning_init):
            nn.init.zeros_(table.weight)

    def forward(self, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """(B, N, token_s), the same on all ranks, from the token features ``res_type``, ``profile``, ``deletion_mean``,
        ``method_feature``, ``modified``, ``cyclic_period`` and ``mol_type`` and those of this rank's atoms that
        :class:`~cpfold_train.model.atom_encoder.AtomEncoder` reads."""
        q, c, p = self.atom_encoder(feats, cp)
        bias = normed_linear(p, *self.atom_enc_proj_z, cp.kernels)
        s, _, _ = self.atom_attention_encoder(feats, q, c, bias, cp)
        return gather_shards(s, cp, "atom_tokens") + self._embed_tokens(feats)

    def _embed_tokens(self, feats: dict[str, Tensor]) -> Tensor:
        dtype = self.res_type_encoding.weight.dtype
        profile = torch.cat([feats["profile"], feats["deletion_mean"][..., None]], -1)
        s = self.res_type_encoding(feats["res_type"].to(dtype)) + self.msa_profile_encoding(profile.to(dtype))
        s = s + self.method_conditioning_init(feats["method_feature"])
        s = s + self.modified_conditioning_init(feats["modified"])
        s = s + self.cyclic_conditioning_init(feats["cyclic_period"].clamp(max=1)[..., None].to(dtype))
        return s + self.mol_type_conditioning_init(feats["mol_type"])


class Positions(NamedTuple):
    """What relative positions are of, under the names of the features."""

    asym_id: Tensor
    residue_index: Tensor
    entity_id: Tensor
    token_index: Tensor
    sym_id: Tensor
    cyclic_period: Tensor


class RelativePositionEncoder(nn.Module):
    """Where two tokens stand to each other in sequence, residue and chain (AlphaFold 3, Algorithm 3).

    Of the 139 one-hot features [residue 66, token 66, same entity 1, chain 6] a pair has at most four that are not
    zero, so the linear layer is a sum of look-ups. Two tokens of different entities share the chain bin "other", and
    residue offsets wrap around in cyclic chains.
    """

    R_MAX, S_MAX = 32, 2

    def __init__(self, token_z: int) -> None:
        super().__init__()
        self.linear_layer = linear(4 * (self.R_MAX + 1) + 2 * (self.S_MAX + 1) + 1, token_z, "default")

    def forward(self, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """Tile (B, N/R, N/C, token_z) from ``asym_id``, ``residue_index``, ``entity_id``, ``token_index``, ``sym_id``
        and ``cyclic_period`` (B, N)."""
        n = feats["asym_id"].shape[1]
        rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
        i = Positions(*(feats[name][:, rows, None] for name in Positions._fields))
        j = Positions(*(feats[name][:, None, cols] for name in Positions._fields))
        weight = self.linear_layer.weight
        row_bytes = j.asym_id.numel() * weight.shape[0] * weight.element_size()
        return by_rows(self._encode, rows_per_block(row_bytes, weight.device), (i,), (weight, j))

    def _encode(self, i: Positions, weight: Tensor, j: Positions) -> Tensor:
        """Features of rows (B, r, 1), weight (token_z, 139), features of columns (B, 1, N/C) to a tile's rows."""
        same_chain = i.asym_id == j.asym_id
        same_residue = same_chain & (i.residue_index == j.residue_index)
        same_entity = i.entity_id == j.entity_id

        period = j.cyclic_period  # 0 where a chain is not cyclic: its offsets never wrap, however long it is
        offset = i.residue_index - j.residue_index
        turns = torch.round(offset / period.clamp(min=1))
        offset = torch.where(period > 0, offset - period * turns, offset).long()
        residue = _bin(offset, self.R_MAX, same_chain)
        token = _bin(i.token_index - j.token_index, self.R_MAX, same_residue)
        chain = _bin(i.sym_id - j.sym_id, self.S_MAX, same_entity)

        bins = 2 * (self.R_MAX + 1)
        by_residue, by_token, by_entity, by_chain = weight.T.split([bins, bins, 1, 2 * (self.S_MAX + 1)])
        by_entity = torch.cat([torch.zeros_like(by_entity), by_entity])
        return (
            embedding(residue, by_residue)
            + embedding(token, by_token)
            + embedding(same_entity.long(), by_entity)
            + embedding(chain, by_chain)
        )


def _bin(offset: Tensor, most: int, comparable: Tensor) -> Tensor:
    """Clipped offset as 0 ... 2 most, or 2 most + 1 where the two tokens cannot be compared."""
    return torch.where(comparable, (offset + most).clamp(0, 2 * most), 2 * most + 1)


class FourierEmbedding(nn.Module):
    """Frozen random frequencies and phases of ``cos(2 pi (w x + b))`` (AlphaFold 3, Algorithm 22)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(1, dim)
        nn.init.normal_(self.proj.weight)
        nn.init.normal_(self.proj.bias)
        self.proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,) to (B, dim)."""
        return torch.cos(2 * math.pi * linear_of_points(x[:, None], self.proj.weight, self.proj.bias))


class _ContactWeights(NamedTuple):
    weight: Tensor
    bias: Tensor
    unspecified: Tensor
    unselected: Tensor
    fourier_weight: Tensor
    fourier_bias: Tensor


class ContactConditioning(nn.Module):
    """What the user says about a pair: nothing, not chosen, or in contact below a threshold."""

    UNSPECIFIED, UNSELECTED, FIRST_CONTACT = 0, 1, 2
    NUM_CONTACTS = 3
    CUTOFF_MIN, CUTOFF_MAX = 4.0, 20.0

    def __init__(self, token_z: int) -> None:
        super().__init__()
        self.fourier_embedding = FourierEmbedding(token_z)
        self.encoder = linear(self.NUM_CONTACTS + 1 + token_z, token_z, "default", bias=True)
        self.encoding_unspecified = nn.Parameter(torch.zeros(token_z))
        self.encoding_unselected = nn.Parameter(torch.zeros(token_z))

    def forward(self, feats: dict[str, Tensor]) -> Tensor:
        """Tile (B, N/R, N/C, token_z) from the tiles ``contact_conditioning`` (class 0-4) and ``contact_threshold`` (in
        angstrom), (B, N/R, N/C)."""
        kind, threshold = feats["contact_conditioning"], feats["contact_threshold"]
        proj = self.fourier_embedding.proj
        weights = _ContactWeights(
            self.encoder.weight,
            self.encoder.bias,
            self.encoding_unspecified,
            self.encoding_unselected,
            proj.weight,
            proj.bias,
        )
        row_bytes = kind[:, :1].numel() * self.encoder.in_features * self.encoder.weight.element_size()
        return by_rows(self._encode, rows_per_block(row_bytes, kind.device), (kind, threshold), (weights,))

    def _encode(self, kind: Tensor, threshold: Tensor, w: _ContactWeights) -> Tensor:
        threshold = ((threshold - self.CUTOFF_MIN) / (self.CUTOFF_MAX - self.CUTOFF_MIN)).to(w.weight.dtype)[..., None]
        waves = torch.cos(2 * math.pi * linear_of(threshold, w.fourier_weight, w.fourier_bias))
        by_kind, by_threshold = w.weight.split([self.NUM_CONTACTS, w.weight.shape[1] - self.NUM_CONTACTS], 1)
        x = linear_of(torch.cat([threshold, waves], -1), by_threshold, w.bias)
        x = x + embedding((kind.long() - self.FIRST_CONTACT).clamp(min=0), by_kind.T)
        return (
            x * (kind >= self.FIRST_CONTACT)[..., None]
            + w.unspecified * (kind == self.UNSPECIFIED)[..., None]
            + w.unselected * (kind == self.UNSELECTED)[..., None]
        )
