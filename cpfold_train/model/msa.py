"""The MSA module (AlphaFold 3, Algorithm 8, with Boltz-2's order of updates; ``boltz/model/modules/trunkv2.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.fused import product_dtype
from cpfold_train.kernels.layer_norm import layer_norm
from cpfold_train.model.blocks import run_blocks
from cpfold_train.model.config import MemoryConfig, MSAConfig
from cpfold_train.model.layers import Transition, linear, normed_linear
from cpfold_train.model.pair_stack import PairStack, pair_dropout
from cpfold_train.ops import outer_product_mean as opm
from cpfold_train.ops.dropout import drop_rows, row_factors
from cpfold_train.ops.pair_weighted_averaging import pair_weighted_averaging
from cpfold_train.ops.recompute import call, recompute
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.vocabulary import NUM_TOKENS

PWA_HEADS, PWA_WIDTH, OPM_WIDTH = 8, 32, 32
"""Sizes that Boltz-2 fixes in code."""


class PairWeightedAveraging(nn.Module):
    """Gated update of m by averaging over tokens with weights from z."""

    def __init__(self, c_m: int, c_z: int) -> None:
        super().__init__()
        self.norm_m = nn.LayerNorm(c_m)
        self.norm_z = nn.LayerNorm(c_z)
        self.proj_m = linear(c_m, PWA_HEADS * PWA_WIDTH, "default")
        self.proj_g = linear(c_m, PWA_HEADS * PWA_WIDTH, "default")
        self.proj_z = linear(c_z, PWA_HEADS, "default")
        self.proj_o = linear(PWA_HEADS * PWA_WIDTH, c_m, "zero")

    def forward(self, m: Tensor, z: Tensor, token_mask: Tensor, cp: ContextParallel) -> Tensor:
        """Update for an MSA block (B, S/R, N/C, c_m), from a pair tile (B, N/R, N/C, c_z) and a mask (B, N)."""
        m = layer_norm(m, self.norm_m.weight, self.norm_m.bias, cp.kernels, product_dtype(m))
        v = self.proj_m(m).unflatten(-1, (PWA_HEADS, PWA_WIDTH))
        logits = normed_linear(z, self.norm_z, self.proj_z, cp.kernels)
        o = pair_weighted_averaging(v, logits, token_mask, cp)
        return self.proj_o(self.proj_g(m).sigmoid() * o.flatten(-2))


class OuterProductMean(nn.Module):
    """Update of z by the mean outer product of two projections of m."""

    def __init__(self, c_m: int, c_z: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.proj_a = linear(c_m, OPM_WIDTH, "default")
        self.proj_b = linear(c_m, OPM_WIDTH, "default")
        self.proj_o = linear(OPM_WIDTH * OPM_WIDTH, c_z, "zero", bias=True)

    def forward(self, m: Tensor, msa_mask: Tensor, count: Tensor, cp: ContextParallel) -> Tensor:
        """Update for a pair tile (B, N/R, N/C, c_z), from MSA blocks m (B, S/R, N/C, c_m) and msa_mask (B, S/R, N/C),
        and ``count`` of :func:`~cpfold_train.ops.outer_product_mean.pair_counts`."""
        m, mask = layer_norm(m, self.norm.weight, self.norm.bias, cp.kernels, product_dtype(m)), msa_mask[..., None]
        a, b = self.proj_a(m), self.proj_b(m)
        a, b = a * mask.to(a.dtype), b * mask.to(b.dtype)
        return opm.outer_product_mean(a, b, count, self.proj_o.weight, self.proj_o.bias, cp)


class MSALayer(nn.Module):
    """One block: m from z, transition of m, z from m, pair stack."""

    def __init__(self, config: MSAConfig, token_z: int, recompute_updates: bool = False) -> None:
        super().__init__()
        self.run = recompute if recompute_updates else call
        self.msa_transition = Transition(config.msa_s, 4 * config.msa_s)
        self.pair_weighted_averaging = PairWeightedAveraging(config.msa_s, token_z)
        self.pairformer_layer = PairStack(
            token_z, config.pairwise_head_width, config.pairwise_num_heads, recompute_updates
        )
        self.outer_product_mean = OuterProductMean(config.msa_s, token_z)

    def forward(
        self,
        z: Tensor,
        m: Tensor,
        token_mask: Tensor,
        msa_mask: Tensor,
        count: Tensor,
        cp: ContextParallel,
        dropout: Tensor | None,
        msa_dropout: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """New z and m.

        Args:
            z: pair tile (B, N/R, N/C, token_z).
            m: MSA block (B, S/R, N/C, msa_s).
            token_mask: (B, N).
            msa_mask: MSA block (B, S/R, N/C).
            count: pair tile (B, N/R, N/C), sequences that cover both tokens.
            cp: the running grid.
            dropout: (4, B, N), see :func:`~cpfold_train.model.pair_stack.pair_dropout`; None in evaluation.
            msa_dropout: (B, S/R), factors of whole sequences; None in evaluation.
        """

        def averaged(m: Tensor, z: Tensor) -> Tensor:
            update = self.pair_weighted_averaging(m, z, token_mask, cp)
            return m + drop_rows(update, msa_dropout)

        def multiplied(z: Tensor, m: Tensor) -> Tensor:
            return z + self.outer_product_mean(m, msa_mask, count, cp).to(z.dtype)

        m = self.run(averaged, m, z)
        m = self.msa_transition(m, cp.kernels, residual=True)
        z = self.run(multiplied, z, m)
        return self.pairformer_layer.update_pairs(z, token_mask, cp, dropout), m


class MSAModule(nn.Module):
    """Embedding of the MSA and all blocks."""

    def __init__(self, token_s: int, token_z: int, config: MSAConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.z_dropout, self.msa_dropout, self.memory = config.z_dropout, config.msa_dropout, memory
        self.s_proj = linear(token_s, config.msa_s, "default")
        self.msa_proj = linear(NUM_TOKENS + 3, config.msa_s, "default")
        self.layers = nn.ModuleList(
            MSALayer(config, token_z, memory.recompute_updates) for _ in range(config.msa_blocks)
        )

    def forward(
        self, z: Tensor, s_inputs: Tensor, feats: dict[str, Tensor], cp: ContextParallel, draws: RandomStreams | None
    ) -> Tensor:
        """New z, all of it and not the change: the trunk adds it to z once more, as Boltz-2 was trained.

        Args:
            z: pair tile (B, N/R, N/C, token_z).
            s_inputs: (B, N, token_s), the same on all ranks.
            feats: ``msa``, ``msa_mask``, ``has_deletion``, ``deletion_value``, ``msa_paired``: MSA blocks
                (B, S/R, N/C); ``token_pad_mask`` (B, N).
            cp: the running grid.
            draws: dropout of the module; None in evaluation.
        """
        tokens = slice(*cp.grid.col_tokens(s_inputs.shape[1]))
        extra = torch.stack([feats["has_deletion"], feats["deletion_value"], feats["msa_paired"]], -1)
        # A one-hot times a matrix is a look-up of its columns.
        weight = self.msa_proj.weight.T
        m = F.embedding(feats["msa"], weight[:NUM_TOKENS].contiguous()) + extra.to(z.dtype) @ weight[NUM_TOKENS:]
        m = (m + self.s_proj(s_inputs[:, None, tokens])).to(z.dtype)

        count = opm.pair_counts(feats["msa_mask"], cp)

        of_blocks = None if draws is None else draws.each("msa_module", last=range(len(self.layers)))
        dropout = pair_dropout(self.z_dropout, s_inputs.shape[1], of_blocks)
        sequences = cp.grid.msa_rows(m.shape[1] * cp.grid.rows)
        msa_dropout = row_factors(self.msa_dropout, sequences, None if of_blocks is None else of_blocks.at("msa"))

        def block(i: int, z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            drop = (None if factors is None else factors[i] for factors in (dropout, msa_dropout))
            return self.layers[i](z, m, feats["token_pad_mask"], feats["msa_mask"], count, cp, *drop)

        return run_blocks(block, len(self.layers), z, m, self.memory)[0]
