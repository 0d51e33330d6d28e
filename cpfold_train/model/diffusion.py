"""The diffusion module: from noisy coordinates to an update of them.

AlphaFold 3, Algorithms 20 and 21; Boltz-2's names and arithmetic (``boltz/model/modules/diffusionv2.py`` and
``encodersv2.py``). Atoms and tokens of the M samples of each complex are sharded over all ranks; only attention and
the way between atoms and tokens communicate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpfold_train.model.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from cpfold_train.model.config import AtomConfig, DiffusionConfig, MemoryConfig
from cpfold_train.model.diffusion_conditioning import Conditioning
from cpfold_train.model.embedding import FourierEmbedding
from cpfold_train.model.layers import Transition, linear, without_autocast
from cpfold_train.model.transformer import DiffusionTransformer
from cpfold_train.ops.recompute import recompute
from cpfold_train.ops.token_attention import token_attention
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split


class SingleConditioning(nn.Module):
    """Tokens and the noise level (AlphaFold 3, Algorithm 21, lines 6-11)."""

    def __init__(self, token_s: int, dim_fourier: int, num_transitions: int) -> None:
        super().__init__()
        dim = 2 * token_s
        self.norm_single = nn.LayerNorm(dim)
        self.single_embed = linear(dim, dim, "default", bias=True)
        self.fourier_embed = FourierEmbedding(dim_fourier)
        self.norm_fourier = nn.LayerNorm(dim_fourier)
        self.fourier_to_single = linear(dim_fourier, dim, "default")
        self.transitions = nn.ModuleList(Transition(dim, 2 * dim) for _ in range(num_transitions))

    def forward(self, times: Tensor, s_trunk: Tensor, s_inputs: Tensor, kernels: str) -> Tensor:
        """Scaled noise levels (B*M,) and tokens (B, n, token_s) to (B*M, n, 2 token_s). Local; ``kernels`` are those of
        the transitions."""
        s = self.single_embed(self.norm_single(torch.cat([s_trunk, s_inputs], -1)))
        noise = self.fourier_to_single(self.norm_fourier(self.fourier_embed(times)))
        s = (s[:, None] + noise.unflatten(0, (s.shape[0], -1))[:, :, None]).flatten(0, 1)
        for transition in self.transitions:
            s = transition(s, kernels, residual=True)
        return s


class DiffusionModule(nn.Module):
    """Atoms to tokens, attention between all tokens, tokens to atoms: an fp32 island.

    Args:
        token_s: width of the single representation.
        atoms: sizes.
        config: sizes.
        memory: what is kept for the backward pass.
    """

    def __init__(self, token_s: int, atoms: AtomConfig, config: DiffusionConfig, memory: MemoryConfig) -> None:
        super().__init__()
        dim = 2 * token_s
        self.memory = memory
        self.single_conditioner = SingleConditioning(token_s, config.dim_fourier, config.conditioning_transition_layers)
        self.atom_attention_encoder = AtomAttentionEncoder(atoms, token_s, True, memory)
        self.s_to_a_linear = nn.Sequential(nn.LayerNorm(dim), linear(dim, dim, "zero"))
        self.token_transformer = DiffusionTransformer(
            config.token_transformer_depth, config.token_transformer_heads, dim, dim
        )
        self.a_norm = nn.LayerNorm(dim)
        self.atom_attention_decoder = AtomAttentionDecoder(atoms, token_s, memory)

    def forward(
        self,
        s_inputs: Tensor,
        s_trunk: Tensor,
        r_noisy: Tensor,
        times: Tensor,
        feats: dict[str, Tensor],
        conditioning: Conditioning,
        cp: ContextParallel,
    ) -> Tensor:
        """Update of the coordinates of this rank's atoms.

        Args:
            s_inputs, s_trunk: (B, N, token_s), the same on all ranks.
            r_noisy: (B*M, A/P, 3) scaled noisy coordinates; the M samples of a complex follow each other.
            times: (B*M,) scaled noise levels, the same on all ranks.
            feats: of the rank's atoms ``atom_pad_mask`` and ``atom_to_token`` (B, A/P), and ``token_atom_start``
                (B, N + 1).
            conditioning: see there.
            cp: the running grid.

        Returns:
            (B*M, A/P, 3), meaningless for padded atoms.
        """
        dtype, multiplicity = self.a_norm.weight.dtype, r_noisy.shape[0] // s_trunk.shape[0]
        with without_autocast(r_noisy):
            own = slice(*split(s_trunk.shape[1], cp.all.size)[cp.all.index])
            args = times.to(dtype), s_trunk[:, own].to(dtype), s_inputs[:, own].to(dtype), cp.kernels
            condition = self.single_conditioner
            s = recompute(condition, *args) if self.memory.recompute else condition(*args)

            q, c, enc_bias, dec_bias = (x.to(dtype) for x in conditioning[:4])
            r_noisy = r_noisy.to(dtype)
            a, q, c = self.atom_attention_encoder(feats, q, c, enc_bias, cp, r_noisy, multiplicity)

            def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                return token_attention(q, k, v, bias, cp)

            a = a + self.s_to_a_linear(s)
            a = self.token_transformer(a, s, conditioning.token_trans_bias, attend, self.memory.recompute)
            return self.atom_attention_decoder(self.a_norm(a), q, c, dec_bias, feats, cp)
