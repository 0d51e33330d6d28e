"""Attention of atoms within windows, and their way to tokens and back.

AlphaFold 3, Algorithms 5 to 7; Boltz-2's names and arithmetic (``boltz/model/modules/encodersv2.py`` and
``transformersv2.py``). All values are of this rank's shard of the atoms or tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.model.layers import linear, without_autocast
from cpfold_train.model.transformer import DiffusionTransformer
from cpfold_train.ops.atom_tokens import atoms_to_tokens, tokens_to_atoms
from cpfold_train.ops.points import linear_of_points
from cpfold_train.ops.window_attention import attend_in_windows
from cpfold_train.parallel.context import ContextParallel


class AtomTransformer(nn.Module):
    """The diffusion transformer in windows of 32 atoms that attend to 128."""

    def __init__(self, atom_s: int, depth: int, heads: int, memory: MemoryConfig) -> None:
        super().__init__()
        self.heads = heads
        self.memory = memory
        self.diffusion_transformer = DiffusionTransformer(depth, heads, atom_s, atom_s)

    def forward(self, q: Tensor, c: Tensor, bias: Tensor, atom_pad_mask: Tensor, cp: ContextParallel) -> Tensor:
        """New ``q``.

        Args:
            q: (B M, A/P, atom_s), M samples of each complex.
            c: (B M, A/P, atom_s).
            bias: (B, A/32P, 32, 128, depth * heads), layer by layer.
            atom_pad_mask: (B, A/P).
            cp: the running grid.
        """
        bias_of = bias.split(self.heads, -1).__getitem__
        attend = attend_in_windows(atom_pad_mask, cp)
        return self.diffusion_transformer(q, c, bias_of, attend, self.memory.recompute)


class AtomAttentionEncoder(nn.Module):
    """From atoms to tokens.

    Args:
        atoms: sizes.
        token_s: width of the single representation.
        structure_prediction: whether it also reads coordinates and makes tokens twice as wide, as in the diffusion
            module.
        memory: what is kept for the backward pass.
    """

    def __init__(self, atoms: AtomConfig, token_s: int, structure_prediction: bool, memory: MemoryConfig) -> None:
        super().__init__()
        self.structure_prediction = structure_prediction
        if structure_prediction:
            self.r_to_q_trans = linear(3, atoms.atom_s, "zero")
        self.atom_encoder = AtomTransformer(atoms.atom_s, atoms.atom_encoder_depth, atoms.atom_encoder_heads, memory)
        width = 2 * token_s if structure_prediction else token_s
        self.atom_to_token_trans = nn.Sequential(linear(atoms.atom_s, width, "default"), nn.ReLU())

    def forward(
        self,
        feats: dict[str, Tensor],
        q: Tensor,
        c: Tensor,
        atom_enc_bias: Tensor,
        cp: ContextParallel,
        r: Tensor | None = None,
        multiplicity: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode M = ``multiplicity`` samples of each complex.

        Args:
            feats: ``atom_pad_mask`` and ``atom_to_token`` (B, A/P), ``token_atom_start`` (B, N + 1).
            q: (B, A/P, atom_s) of :class:`~cpfold_train.model.atom_encoder.AtomEncoder`.
            c: the same.
            atom_enc_bias: (B, A/32P, 32, 128, depth * heads), layer by layer.
            cp: the running grid.
            r: (B M, A/P, 3) scaled noisy coordinates; read in structure prediction only.
            multiplicity: M.

        Returns:
            ``a`` (B M, N/P, 2 token_s, or token_s outside structure prediction), the mean over each token's atoms;
            ``q`` and ``c`` (B M, A/P, atom_s).
        """
        q, c = q.repeat_interleave(multiplicity, 0), c.repeat_interleave(multiplicity, 0)
        if self.structure_prediction:
            q = q + linear_of_points(r, self.r_to_q_trans.weight)
        q = self.atom_encoder(q, c, atom_enc_bias, feats["atom_pad_mask"], cp)
        return atoms_to_tokens(q, self.atom_to_token_trans[0].weight, feats, cp).to(q.dtype), q, c


class AtomAttentionDecoder(nn.Module):
    """From tokens to a shift of each atom (AlphaFold 3, Algorithm 6)."""

    def __init__(self, atoms: AtomConfig, token_s: int, memory: MemoryConfig) -> None:
        super().__init__()
        self.a_to_q_trans = linear(2 * token_s, atoms.atom_s, "zero")
        self.atom_decoder = AtomTransformer(atoms.atom_s, atoms.atom_decoder_depth, atoms.atom_decoder_heads, memory)
        self.atom_feat_to_atom_pos_update = nn.Sequential(nn.LayerNorm(atoms.atom_s), linear(atoms.atom_s, 3, "zero"))

    def forward(
        self,
        a: Tensor,
        q: Tensor,
        c: Tensor,
        atom_dec_bias: Tensor,
        feats: dict[str, Tensor],
        cp: ContextParallel,
    ) -> Tensor:
        """Decode.

        Args:
            a: (B M, N/P, 2 token_s), M samples of each complex.
            q: (B M, A/P, atom_s) of :class:`AtomAttentionEncoder`.
            c: the same.
            atom_dec_bias: (B, A/32P, 32, 128, depth * heads), layer by layer.
            feats: as there.
            cp: the running grid.

        Returns:
            (B M, A/P, 3), meaningless for padded atoms.
        """
        with without_autocast(a):
            a_to_q = tokens_to_atoms(self.a_to_q_trans(a.to(self.a_to_q_trans.weight.dtype)), feats, cp)
        q = self.atom_decoder(q + a_to_q.to(q.dtype), c, atom_dec_bias, feats["atom_pad_mask"], cp)
        return self.atom_feat_to_atom_pos_update(q)
