"""What runs without gradients, validation and prediction, counted as the training step is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from cpfold_train.config.schema import TrainConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.step import (
    SAMPLING_STEPS,
    PassTracer,
    Trace,
    autocast,
    build,
    features,
    keep_between_steps,
    without_contents,
)
from cpfold_train.predict.predictor import Predictor, Settings
from cpfold_train.simulate.batch import CHAINS
from cpfold_train.simulate.contents import Contents
from cpfold_train.simulate.work_counter import Speed


def trace_validation(
    config: TrainConfig,
    grid: Grid,
    batch: dict[str, Tensor],
    speed: Speed,
    on_host: bool,
    device: str = "cpu",
) -> Trace:
    """One batch of validation between two training steps; arguments as of
    :func:`~cpfold_train.plan.step.trace_step`."""
    recycling = min(1, config.model.recycling_steps)
    sampling = min(SAMPLING_STEPS, config.diffusion.validation_steps)
    model = replace(config.model, recycling_steps=recycling)
    module = build(replace(config, model=model, diffusion=replace(config.diffusion, validation_steps=sampling)))
    with without_contents(module, config, grid, speed, on_host, device=device) as (cp, tracer):
        keep_between_steps(module, config, tracer)
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
        module.eval()
        # They are no buffer, so they are on the meta device with what was built there.
        module._sums = torch.zeros_like(module._sums, device="cpu")
        passes = PassTracer(tracer, module.model)
        fed = features(batch, tracer, device) | {"filler": torch.zeros(config.batch_size, dtype=torch.bool)}
        with autocast(config, device), torch.no_grad(), Contents(config.crop_size, CHAINS):
            module.validation_step(fed, 0)
        return passes.trace(recycling, sampling)


def trace_prediction(
    config: TrainConfig,
    grid: Grid,
    batch: dict[str, Tensor],
    speed: Speed,
    on_host: bool,
    device: str = "cpu",
) -> Trace:
    """One query: ``diffusion.samples`` structures in ``diffusion.sampling_steps`` steps, and how sure the model is of
    them; arguments as of :func:`~cpfold_train.plan.step.trace_step`."""
    recycling = min(1, config.model.recycling_steps)
    sampling = min(SAMPLING_STEPS, config.diffusion.sampling_steps)
    settings = Settings(config.diffusion.samples, sampling, recycling, config.data.max_msa_rows, None, config.seed)
    module = build(config)
    with without_contents(module, config, grid, speed, on_host, device=device) as (cp, tracer):
        predictor = Predictor(module.model, settings, writer=None)
        predictor.eval()
        passes = PassTracer(tracer, module.model)
        fed = features(batch, tracer, device)
        with autocast(config, device), torch.no_grad(), Contents(config.crop_size, CHAINS):
            predictor.sampled(fed, cp)
        return passes.trace(recycling, sampling)
