"""Losses of structures and confidences as ops of the benchmark, which have no weights."""

from __future__ import annotations

from torch import nn

from cpfold_train.losses.diffusion import diffusion_loss
from cpfold_train.losses.smooth_lddt import smooth_lddt_loss
from cpfold_train.losses.total import confidence_losses
from cpfold_train.model.config import DiffusionConfig
from cpfold_train.simulate.bench.case import BenchCase

LOGITS = ("plddt_logits", "resolved_logits", "pde_logits", "pae_logits")
SIGMA_DATA = DiffusionConfig().sigma_data

LOSSES = {
    "diffusion_loss": BenchCase(
        lambda c: nn.Module(),
        ("denoised_coords",),
        lambda f, x, cp: (diffusion_loss(x["denoised_coords"], x["noisy_coords"], x["sigmas"], x, cp, SIGMA_DATA),),
    ),
    "smooth_lddt": BenchCase(
        lambda c: nn.Module(),
        ("denoised_coords",),
        lambda f, x, cp: (smooth_lddt_loss(x["denoised_coords"], x, cp),),
    ),
    "confidence_losses": BenchCase(
        lambda c: nn.Module(),
        LOGITS,
        lambda f, x, cp: tuple(confidence_losses(x, x["noisy_coords"], x, cp).values()),
    ),
}
