"""Every numeric key of the model, the losses, the optimizer and memory reaches what is computed."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpfold_train.cli.run import make_callbacks
from cpfold_train.config.check_bounds import keys_of
from cpfold_train.config.schema import LossConfig, TrainConfig
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.stream.batch import collate
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.parity import randomise
from cpfold_train.testing.step_case import settings
from cpfold_train.training.apply import block_bytes, prepare_module
from cpfold_train.training.ema import MovingAverage
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.schedule_start import schedule_start
from tests.complexes import crops

VALUES = {
    # Levels of noise are far above 1 Angstrom until the last.
    "model.diffusion.gamma_min": 1e6,
    # What is sampled with random weights is far apart.
    "model.confidence.max_dist": 1e4,
    "memory.samples_at_once": 1,
    "memory.chunk_mib": 0.001,
    "optim.betas": (0.8, 0.9),
    "optim.start_step": 3,
}
"""What keys are changed to where twice as much would not do."""
NOT_NUMBERS = {
    "model.features": "default of data.features: tests/test_feature_sets.py",
    "model.init_from": "a checkpoint: tests/test_boltz_checkpoint.py",
    "model.init_weights": "of a checkpoint: tests/test_boltz_checkpoint.py",
    "model.init_skip": "of a checkpoint: tests/test_boltz_checkpoint.py",
    "memory.auto": "decides the others: tests/test_plan.py",
    "memory.recompute": "what is kept: tests/test_parity.py",
    "memory.recompute_updates": "what is kept: tests/test_parity.py",
    "memory.residual": "rounds z between blocks: tests/test_parity.py",
    "memory.offload": "where it is kept: tests/test_parity.py",
    "memory.keep_attention": "what is kept: tests/test_parity.py",
}
"""Keys that are no numbers, and what tests them."""


@cache
def base() -> TrainConfig:
    """All losses, two blocks and two samples, so that how many are taken at once makes a difference."""
    config = settings()
    model = replace(config.model, pairformer=replace(config.model.pairformer, num_blocks=2))
    diffusion = replace(config.diffusion, sampling_steps=3, multiplicity=2)
    trainer = replace(config.trainer, precision="32-true")
    return replace(config, model=model, diffusion=diffusion, trainer=trainer, loss=LossConfig(*[1.0] * 8))


KEYS = [
    f"{group}.{key}"
    for group in ("model", "loss", "optim", "memory")
    for key, *_ in keys_of(getattr(base(), group))
    if f"{group}.{key}" not in NOT_NUMBERS
]


@pytest.fixture(scope="module", autouse=True)
def no_process_group_stays():
    """A world of this process alone comes with the grid."""
    yield
    dist.destroy_process_group()


@cache
def batch() -> dict[str, Any]:
    """A complex of a few chains, with a template."""
    crop = crops()[0]
    template = make_template(crop.structure, crop.structure, [(0, 0)])
    return collate([replace(crop, templates=[template])], Grid())


def changed(config: Any, key: str, full: str, to: int | None = None) -> Any:
    """The configuration with one key as given, or as :data:`VALUES` has it, or twice as large."""
    name, _, rest = key.partition(".")
    value = getattr(config, name)
    if is_dataclass(value):
        return replace(config, **{name: changed(value, rest, full, to)})
    return replace(config, **{name: VALUES.get(full, 2 * value if value else 1) if to is None else to})


def shapes(config: TrainConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in prepare_module(config).named_parameters()}


def ready(config: TrainConfig) -> CoFoldingModule:
    """A module with random weights on a world of its own."""
    module = prepare_module(config)
    randomise(module)
    for parameter in module.parameters():
        parameter.data *= 0.3
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(cp=ContextParallel(Grid(), "cpu", kernels="torch")), global_step=0
    )
    return module


def training(config: TrainConfig) -> tuple[list[float], list[int]]:
    """Losses of a training step that recycles as often as it may, and sizes of what it keeps for the backward pass."""
    module = ready(config)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = module.micro_batch(batch(), config.model.recycling_steps)
    return [loss.item() for loss in found["partial_losses"].values()], kept


def schedule(config: TrainConfig) -> Any:
    """What the optimizer, its schedule and the moving average are made of."""
    with torch.device("meta"):
        module = prepare_module(config)
    made = module.configure_optimizers()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in made["optimizer"].param_groups]
    (factor, *_) = made["lr_scheduler"]["scheduler"].lr_lambdas
    averages = [x._decay for x in make_callbacks(config, Path("run"), None) if isinstance(x, MovingAverage)]
    factors = [factor(step) for step in (0, config.optim.warmup_steps, 60000)]
    return groups, factors, averages, schedule_start(config, Path("run"))


@cache
def of_base(what) -> Any:
    return what(base())


@pytest.mark.parametrize("key", KEYS)
def test_a_key_reaches_the_computation(key):
    config = changed(base(), key, key)
    observed = (schedule,) if key.startswith("optim.") else (shapes, training)
    if key == "memory.chunk_mib":
        # Of the process: rows at a time.
        observed = (lambda config: block_bytes(config.memory),)
    assert any(what(config) != of_base(what) for what in observed)


def test_keys_that_are_no_numbers_are_there():
    known = {f"{group}.{key}" for group in ("model", "memory") for key, *_ in keys_of(getattr(base(), group))}
    assert set(NOT_NUMBERS) <= known


NO_BLOCKS = ("msa.msa_blocks", "pairformer.num_blocks", "template.template_blocks")
NO_LAYERS = ("diffusion.token_transformer_depth", "diffusion.conditioning_transition_layers")


@pytest.mark.parametrize("key", [*NO_BLOCKS, *NO_LAYERS])
def test_a_part_without_blocks_keeps_no_rank_waiting(key):
    """DistributedDataParallel ends a run for parameters that it waits for and that have no gradient."""
    module = ready(changed(base(), f"model.{key}", key, to=0))
    module.micro_batch(batch(), 1)["loss"].backward()
    without = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= set(module._ddp_params_and_buffers_to_ignore)
    assert bool(without) == (key == "msa.msa_blocks")
