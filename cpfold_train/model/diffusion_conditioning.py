"""What every diffusion sample of a complex has in common, computed once.

Boltz-2's names and arithmetic: ``boltz/model/modules/diffusion_conditioning.py``, and PairwiseConditioning of
``encodersv2.py`` (AlphaFold 3, Algorithm 21, lines 1-5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.regions import region
from cpfold_train.kernels.transition import transition_at_once
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, DiffusionConfig
from cpfold_train.model.layers import Transition, linear, normed_linear
from cpfold_train.ops.pair_bias import pair_bias
from cpfold_train.parallel.context import ContextParallel


class Conditioning(NamedTuple):
    """What :class:`~cpfold_train.model.diffusion.DiffusionModule` is conditioned on.

    Attributes:
        q, c: this rank's atoms (B, A/P, atom_s).
        atom_enc_bias, atom_dec_bias: windows (B, A/32P, 32, 128, depth * heads), layer by layer.
        token_trans_bias: the bias of layer i of the transformer of tokens, tile (B, heads, N/R, N/C); keys that are no
            real tokens are masked in it.
    """

    q: Tensor
    c: Tensor
    atom_enc_bias: Tensor
    atom_dec_bias: Tensor
    token_trans_bias: Callable[[int], Tensor]


class PairwiseConditioning(nn.Module):
    """The pair representation with relative positions."""

    def __init__(self, token_z: int, num_transitions: int) -> None:
        super().__init__()
        self.dim_pairwise_init_proj = nn.Sequential(nn.LayerNorm(2 * token_z), linear(2 * token_z, token_z, "default"))
        self.transitions = nn.ModuleList(Transition(token_z, 2 * token_z) for _ in range(num_transitions))

    def forward(self, z_trunk: Tensor, rel_pos: Tensor) -> Tensor:
        """Two tiles (B, N/R, N/C, token_z) to one. Local, a few rows at a time; only the two are kept."""
        norm, project = self.dim_pairwise_init_proj
        shared = [norm.weight, norm.bias, project.weight, *(w for layer in self.transitions for w in layer.weights())]
        # A block holds the intermediates of all transitions together, some 30 times its rows.
        row_bytes = 8 * z_trunk[:, :1].numel() * z_trunk.element_size()
        return by_rows(_conditioned, rows_per_block(row_bytes, z_trunk.device), (z_trunk, rel_pos), shared)


@region
def _conditioned(
    z_trunk: Tensor, rel_pos: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *transitions: Tensor
) -> Tensor:
    x = torch.cat([z_trunk, rel_pos.to(z_trunk.dtype)], -1)
    z = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias), weight)
    for first in range(0, len(transitions), 5):
        z = z + transition_at_once(z, *transitions[first : first + 5])
    return z


class DiffusionConditioning(nn.Module):
    """Conditioning of atoms, of their pairs in windows, and of pairs of tokens."""

    def __init__(self, token_s: int, token_z: int, atoms: AtomConfig, config: DiffusionConfig) -> None:
        super().__init__()
        self.pairwise_conditioner = PairwiseConditioning(token_z, config.conditioning_transition_layers)
        self.atom_encoder = AtomEncoder(atoms, token_s, token_z, structure_prediction=True)
        self.atom_enc_proj_z = _projections(atoms.atom_z, atoms.atom_encoder_heads, atoms.atom_encoder_depth)
        self.atom_dec_proj_z = _projections(atoms.atom_z, atoms.atom_decoder_heads, atoms.atom_decoder_depth)
        self.token_trans_proj_z = _projections(token_z, config.token_transformer_heads, config.token_transformer_depth)

    def forward(
        self, s_trunk: Tensor, z_trunk: Tensor, rel_pos: Tensor, feats: dict[str, Tensor], cp: ContextParallel
    ) -> Conditioning:
        """Condition on the trunk.

        The biases of all layers of the transformer of tokens would be 24 x 16 channels: three times the tile, and as
        much again for their gradient. Only the tile is kept, and a layer projects its own 16 when it runs. That is
        about 5 k operations a pair, where attention of M samples takes 3 k times M.

        Args:
            s_trunk: (B, N, token_s), the same on all ranks.
            z_trunk: tile (B, N/R, N/C, token_z).
            rel_pos: tile (B, N/R, N/C, token_z) of the trunk's relative positions.
            feats: those of :class:`~cpfold_train.model.atom_encoder.AtomEncoder`, and ``token_pad_mask`` (B, N).
            cp: the running grid.
        """
        z = self.pairwise_conditioner(z_trunk, rel_pos)
        q, c, p = self.atom_encoder(feats, cp, s_trunk, z)
        enc, dec = (
            torch.cat([normed_linear(p, *layer, cp.kernels) for layer in layers], -1)
            for layers in (self.atom_enc_proj_z, self.atom_dec_proj_z)
        )
        mask = feats["token_pad_mask"]
        key_mask = mask[:, None, slice(*cp.grid.col_tokens(mask.shape[1]))].expand(z.shape[:3])

        def token_trans_bias(i: int) -> Tensor:
            norm, project = self.token_trans_proj_z[i]
            return pair_bias(z, key_mask, norm.weight, norm.bias, project.weight, 1e6)

        return Conditioning(q, c, enc, dec, token_trans_bias)


def _projections(c_in: int, heads: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.LayerNorm(c_in), linear(c_in, heads, "default")) for _ in range(depth))
