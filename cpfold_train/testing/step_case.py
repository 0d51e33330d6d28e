"""A whole training step of a tiny model on a real complex: all losses, sampling and confidence among them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cpfold_train.config.compose import compose
from cpfold_train.config.schema import CONFIDENCE, TrainConfig
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.paths import CHECKOUT
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.testing.parity import Case, to_device
from cpfold_train.training.module import CoFoldingModule

SETTINGS = (
    f"data.train=[{CHECKOUT}/data/shards/train-*.tar]",
    "data.val=[]",
    "data.max_msa_rows=4",
    "crop_size=24",
    "cp.grid=1x1",
    "trainer.precision=64-true",
    "kernels=torch",
    "model.token_s=16",
    "model.token_z=8",
    "model.msa.msa_s=8",
    "model.msa.pairwise_head_width=4",
    "model.pairformer.num_blocks=1",
    "model.pairformer.pairwise_head_width=4",
    "model.template.template_dim=8",
    "model.template.pairwise_head_width=4",
    "model.atoms.atom_s=16",
    "model.diffusion.token_transformer_depth=1",
    "model.confidence.pairformer.num_blocks=1",
    "model.confidence.pairformer.pairwise_head_width=4",
    "diffusion.multiplicity=2",
    "diffusion.sampling_steps=2",
    *(f"loss.{name}=0.1" for name in CONFIDENCE),
)


@cache
def settings() -> TrainConfig:
    """The run whose step it is."""
    return compose(list(SETTINGS))


def tiny() -> CoFoldingModule:
    """The model with its losses, in fp64."""
    config = settings()
    return CoFoldingModule(
        config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed
    ).double()  # fmt: skip


def losses(module: nn.Module, x: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """The weighted sum of the losses, which has a gradient, and each of them."""
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    (batch,) = batches_of_data(settings(), cp.grid, 1)
    found = module.micro_batch(to_device(batch, cp.mesh.device_type), 1)
    own = [
        found["loss"] / cp.grid.cp_size,
        *(loss for name, loss in found["partial_losses"].items() if name != "loss"),
    ]
    return all_reduce(torch.stack(own), cp, cp.all, "losses")


STEP = {"training step": Case(tiny, losses, {}, {}, "whole", tolerance=1e-5)}
