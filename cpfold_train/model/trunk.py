"""The trunk: from features to single and pair representations, and the distogram.

AlphaFold 3, Algorithm 1 lines 1-13, as Boltz-2 runs it (``boltz/model/models/boltz2.py``). The attribute names are
those of a Boltz-2 checkpoint.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.model.embedding import ContactConditioning, InputEmbedder, RelativePositionEncoder
from cpfold_train.model.layers import linear, normed_linear
from cpfold_train.model.msa import MSAModule
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.model.templates import TemplateV2Module
from cpfold_train.ops.offload import kept_on_host
from cpfold_train.ops.transpose import transpose
from cpfold_train.parallel.context import ContextParallel, to_local
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.vocabulary import NUM_BOND_TYPES


class DistogramModule(nn.Module):
    """Logits over distance bins, symmetric in the two tokens."""

    def __init__(self, token_z: int, num_bins: int) -> None:
        super().__init__()
        self.distogram = linear(token_z, num_bins, "default", bias=True)

    def forward(self, z: Tensor, cp: ContextParallel) -> Tensor:
        """Tile (B, N/R, N/C, token_z) to (B, N/R, N/C, 1, num_bins)."""
        return self.distogram(z + transpose(z, cp))[..., None, :]


class Trunk(nn.Module):
    """Input embedding, recycling, templates, MSA module, Pairformer and distogram head.

    Attributes:
        pair_dtype: in what z is held, and with it m and all that has the size of either; None, which is the default,
            is the dtype of the weights.

    Args:
        config: sizes.
        memory: what is kept for the backward pass.
    """

    pair_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        token_s, token_z = config.token_s, config.token_z
        self.memory = memory
        self.input_embedder = InputEmbedder(config.atoms, token_s, token_z, memory)
        self.s_init = linear(token_s, token_s, "default")
        self.z_init_1 = linear(token_s, token_z, "default")
        self.z_init_2 = linear(token_s, token_z, "default")
        self.rel_pos = RelativePositionEncoder(token_z)
        self.token_bonds = linear(1, token_z, "default")
        self.token_bonds_type = nn.Embedding(NUM_BOND_TYPES + 1, token_z)
        self.contact_conditioning = ContactConditioning(token_z)
        self.s_norm = nn.LayerNorm(token_s)
        self.z_norm = nn.LayerNorm(token_z)
        self.s_recycle = linear(token_s, token_s, "zero")
        self.z_recycle = linear(token_z, token_z, "zero")
        self.template_module = TemplateV2Module(token_z, config.template, memory)
        self.msa_module = MSAModule(token_s, token_z, config.msa, memory)
        self.pairformer_module = PairformerModule(token_s, token_z, config.pairformer, memory)
        self.distogram_module = DistogramModule(token_z, config.num_bins)

    def forward(
        self, feats: dict[str, Tensor | DTensor], cp: ContextParallel, recycling_steps: int, draws: RandomStreams | None
    ) -> dict[str, DTensor]:
        """Run the trunk ``recycling_steps + 1`` times, the last time with gradients.

        Args:
            feats: token features (B, N, ...), replicated; pair tiles (B, N/R, N/C, ...), MSA blocks (B, S/R, N/C) and
                shards of atoms (B, A/P, ...), as DTensors or as this rank's plain tensors.
            cp: the running grid. N is a multiple of R * C, S of R and A of 32 R * C.
            recycling_steps: how often s and z are fed back.
            draws: dropout of this batch; None in evaluation.

        Returns:
            ``s_inputs`` and ``s`` (B, N, token_s), replicated; ``z`` (B, N, N, token_z) and ``pdistogram``
            (B, N, N, 1, num_bins), tiled.
        """
        feats = to_local(feats)
        s_inputs = self.input_embedder(feats, cp)
        s_init, z_init = self.s_init(s_inputs), self._embed_pairs(s_inputs, feats, cp)

        with_grad = torch.is_grad_enabled()
        s, z = torch.zeros_like(s_init), torch.zeros_like(z_init)
        for cycle in range(recycling_steps + 1):
            with torch.set_grad_enabled(with_grad and cycle == recycling_steps):
                if cycle == recycling_steps:
                    # Autocast caches casts of weights; those made without gradients must not be reused with them.
                    torch.clear_autocast_cache()
                at = None if draws is None else draws.at("recycling", cycle)
                s = s_init + self.s_recycle(self.s_norm(s))
                with kept_on_host(None) if self.memory.offload else nullcontext():
                    z = z_init + normed_linear(z, self.z_norm, self.z_recycle, cp.kernels)
                    z = z + self.template_module(z, feats, cp, at)
                # The MSA module returns all of z, so z doubles here: checkpoints are trained so.
                z = z + self.msa_module(z, s_inputs, feats, cp, at)
                s, z = self.pairformer_module(s, z, feats["token_pad_mask"], cp, at)

        pdistogram = self.distogram_module(z, cp)
        return {
            "s_inputs": cp.replicated(s_inputs),
            "s": cp.replicated(s),
            "z": cp.tiled(z),
            "pdistogram": cp.tiled(pdistogram),
        }

    def _embed_pairs(self, s_inputs: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """Initial z, tile (B, N/R, N/C, token_z)."""
        n = s_inputs.shape[1]
        rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
        z = self.z_init_1(s_inputs[:, rows])[:, :, None] + self.z_init_2(s_inputs[:, cols])[:, None]
        z = z + self.rel_pos(feats, cp)
        z = z + self.token_bonds(feats["token_bonds"].to(self.token_bonds.weight.dtype))
        z = z + self.token_bonds_type(feats["type_bonds"].long())
        z = z + self.contact_conditioning(feats)
        return z if self.pair_dtype is None else z.to(self.pair_dtype)
