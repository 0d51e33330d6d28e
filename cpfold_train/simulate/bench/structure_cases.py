"""Ops of the benchmark that read structures, make them or rate them: templates, diffusion, confidence."""

from __future__ import annotations

from torch import Tensor, nn

from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.confidence import ConfidenceModule
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.model.diffusion import DiffusionModule
from cpfold_train.model.diffusion_conditioning import DiffusionConditioning
from cpfold_train.model.templates import TemplateV2Module
from cpfold_train.model.transformer import DiffusionTransformer
from cpfold_train.ops.token_attention import token_attention
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.simulate.bench.case import BenchCase, Inputs


class _Denoiser(nn.Module):
    """The diffusion module with its conditioning, which is computed once for all samples."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conditioning = _conditioning(config)
        self.score_model = DiffusionModule(config.token_s, config.atoms, config.diffusion, MemoryConfig())

    def forward(self, x: Inputs, cp: ContextParallel) -> tuple[Tensor]:
        conditioning = self.conditioning(x["s"], x["z"], x["rel_pos"], x, cp)
        return (self.score_model(x["s_inputs"], x["s"], x["noisy_coords"], x["times"], x, conditioning, cp),)


def _conditioning(config: ModelConfig) -> DiffusionConditioning:
    return DiffusionConditioning(config.token_s, config.token_z, config.atoms, config.diffusion)


def _condition(module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor, ...]:
    """All that is computed once, and the bias of one layer."""
    *conditioning, token_trans_bias = module(x["s"], x["z"], x["rel_pos"], x, cp)
    return *conditioning, token_trans_bias(0)


def _token_transformer(config: ModelConfig) -> DiffusionTransformer:
    dim, diffusion = 2 * config.token_s, config.diffusion
    return DiffusionTransformer(diffusion.token_transformer_depth, diffusion.token_transformer_heads, dim, dim)


def _transform(module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor]:
    """All layers, recomputed, with one bias."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return token_attention(q, k, v, bias, cp)

    return (module(x["a"], x["s_of_tokens"], lambda i: x["token_bias"], attend, True),)


def _predict_confidence(module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor, ...]:
    """As in training, with no gradient to the trunk."""
    samples = len(x["noisy_coords"])
    logits = module(x["s_inputs"].detach(), x["s"].detach(), x["z"].detach(), x["noisy_coords"], x, samples, cp, None)
    return tuple(logits.values())


STRUCTURE = {
    "template_module": BenchCase(
        lambda c: TemplateV2Module(c.token_z, c.template, MemoryConfig()),
        ("z",),
        lambda f, x, cp: (f(x["z"], x, cp, None),),
    ),
    "atom_encoder": BenchCase(
        lambda c: AtomEncoder(c.atoms, c.token_s, c.token_z, structure_prediction=True),
        ("s", "z"),
        lambda f, x, cp: f(x, cp, x["s"], x["z"]),
    ),
    "diffusion_conditioning": BenchCase(_conditioning, ("s", "z", "rel_pos"), _condition),
    "token_transformer": BenchCase(_token_transformer, ("a", "s_of_tokens", "token_bias"), _transform),
    "diffusion_module": BenchCase(_Denoiser, ("s_inputs", "s", "z", "rel_pos"), lambda f, x, cp: f(x, cp)),
    "confidence_module": BenchCase(
        lambda c: ConfidenceModule(c, MemoryConfig()), ("s_inputs", "s", "z", "pair_features"), _predict_confidence
    ),
}
