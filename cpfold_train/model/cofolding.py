"""The whole of Boltz-2: the trunk, the diffusion of atoms, and the heads that say how sure it is.

AlphaFold 3, Algorithm 1; ``boltz/model/models/boltz2.py``. The attribute names are those of a Boltz-2 checkpoint, where
the trunk's modules stand beside the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cpfold_train.model.bfactor import BFactorModule
from cpfold_train.model.confidence import ConfidenceModule
from cpfold_train.model.confidence_scores import confidence_scores
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.model.diffusion_conditioning import Conditioning, DiffusionConditioning
from cpfold_train.model.edm import AtomDiffusion
from cpfold_train.model.trunk import Trunk
from cpfold_train.parallel.context import ContextParallel, to_local
from cpfold_train.parallel.random import RandomStreams

Feats = dict[str, Tensor | DTensor]


class CoFolding(nn.Module):
    """From features to distances, denoised atoms, sampled structures and their confidence.

    Features are placed as :data:`cpfold_train.data.schema.FEATURES` says, and are DTensors or this rank's plain
    tensors. What :meth:`forward` returns are DTensors, all else this rank's plain tensors: pair tiles
    (B, N/R, N/C, ...), atom shards (B M, A/P, ...) of M diffusion samples of each of the B complexes, and tokens
    whole (B, N, ...).

    Args:
        config: sizes.
        memory: what is kept for the backward pass.
    """

    def __init__(self, config: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config, memory)
        self.diffusion_conditioning = DiffusionConditioning(
            config.token_s, config.token_z, config.atoms, config.diffusion
        )
        self.structure_module = AtomDiffusion(config.token_s, config.atoms, config.diffusion, memory)
        self.bfactor_module = BFactorModule(config.token_s, config.num_bins)
        self.confidence_module = ConfidenceModule(config, memory)

    def forward(
        self, feats: Feats, cp: ContextParallel, *, recycling_steps: int, multiplicity: int, draws: RandomStreams
    ) -> dict[str, DTensor]:
        """Denoise M = ``multiplicity`` noised copies of each true structure.

        Args:
            feats: of B complexes.
            cp: the running grid.
            recycling_steps: how often the trunk's s and z are fed back.
            multiplicity: M.
            draws: of the noise and, in training mode, of dropout; a family of streams a complex.

        Returns:
            What :class:`~cpfold_train.model.trunk.Trunk` returns; ``pbfactor`` (B, N, num_bins), replicated;
            ``denoised_atom_coords`` and ``aligned_true_atom_coords`` (B M, A, 3), sharded, and ``sigmas`` (B M,),
            replicated, as :meth:`~cpfold_train.model.edm.AtomDiffusion.forward` describes them.
        """
        feats = to_local(feats)
        out = self.trunk(feats, cp, recycling_steps, draws if self.training else None)
        trunk = to_local(out)
        conditioning = self._condition(trunk, feats, cp)
        denoised = self.structure_module(
            trunk["s_inputs"], trunk["s"], feats, conditioning, multiplicity, draws.at("diffusion"), cp
        )
        return {
            **out,
            "pbfactor": cp.replicated(self.bfactor_module(trunk["s"])),
            "denoised_atom_coords": cp.sharded(denoised["denoised_atom_coords"]),
            "aligned_true_atom_coords": cp.sharded(denoised["aligned_true_atom_coords"]),
            "sigmas": cp.replicated(denoised["sigmas"]),
        }

    @torch.no_grad()
    def sample(
        self,
        trunk: Feats,
        feats: Feats,
        cp: ContextParallel,
        *,
        sampling_steps: int,
        samples: int,
        draws: RandomStreams,
    ) -> Tensor:
        """Structures (B M, A/P, 3) in Angstrom, M = ``samples`` of each complex.

        Args:
            trunk: what the trunk returned.
            feats: what it was given.
            cp: the running grid.
            sampling_steps: levels of noise from the highest to none.
            samples: M.
            draws: of the noise.
        """
        trunk, feats = to_local(trunk), to_local(feats)
        conditioning = self._condition(trunk, feats, cp)
        return self.structure_module.sample(
            trunk["s_inputs"], trunk["s"], feats, conditioning, sampling_steps, samples, draws.at("sampling"), cp
        )

    def predict_confidence(
        self, trunk: Feats, coords: Tensor, feats: Feats, cp: ContextParallel, draws: RandomStreams | None
    ) -> Feats:
        """Confidence logits of sampled structures; see :class:`~cpfold_train.model.confidence.ConfidenceModule`.

        Args:
            trunk: what the trunk returned; no gradient flows to it.
            coords: (B M, A/P, 3).
            feats: what the trunk was given.
            cp: the running grid.
            draws: of dropout; None in evaluation.
        """
        trunk, feats = to_local(trunk), to_local(feats)
        s_inputs, s, z = (trunk[name].detach() for name in ("s_inputs", "s", "z"))
        return self.confidence_module(s_inputs, s, z, coords, feats, len(coords) // len(s), cp, draws)

    @torch.no_grad()
    def predict(
        self,
        feats: Feats,
        cp: ContextParallel,
        *,
        recycling_steps: int,
        sampling_steps: int,
        samples: int,
        draws: RandomStreams,
    ) -> Feats:
        """Sampled structures, and how sure the model is of each; arguments as of :meth:`forward` and :meth:`sample`.

        Returns:
            ``coords`` (B M, A/P, 3) in Angstrom; the scores of
            :func:`~cpfold_train.model.confidence_scores.confidence_scores`; and ``confidence_score`` (B M,), by which
            Boltz-2 ranks: 0.8 times the complex's pLDDT and 0.2 times the ipTM, or the pTM of a single chain.
        """
        feats = to_local(feats)
        trunk = to_local(self.trunk(feats, cp, recycling_steps, None))
        coords = self.sample(trunk, feats, cp, sampling_steps=sampling_steps, samples=samples, draws=draws)
        logits = self.predict_confidence(trunk, coords, feats, cp, None)
        scores = confidence_scores(logits, coords, trunk["pdistogram"], feats, samples, cp)
        tm = torch.where(scores["iptm"] > 0, scores["iptm"], scores["ptm"])
        return {"coords": coords, **scores, "confidence_score": 0.8 * scores["complex_plddt"] + 0.2 * tm}

    def _condition(self, trunk: Feats, feats: Feats, cp: ContextParallel) -> Conditioning:
        rel_pos = self.trunk.rel_pos(feats, cp).to(trunk["z"].dtype)
        return self.diffusion_conditioning(trunk["s"], trunk["z"], rel_pos, feats, cp)
