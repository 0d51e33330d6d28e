"""The training step of one rank of a world that is not there.

Model, losses, backward pass and optimizer are those of training. They run under ``FakeTensorMode``, so tensors have
shapes but no contents, and with torch's fake process group, so messages are counted and go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from cpfold_train.config.check_precision import IN_BF16
from cpfold_train.config.schema import TrainConfig
from cpfold_train.data.schema import ON_HOST
from cpfold_train.dry_run import dry
from cpfold_train.kernels.by_rows import set_block_bytes
from cpfold_train.memory import LARGE_BYTES
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.parallel.context import ContextParallel, fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.cuequivariance import cuequivariance_counted
from cpfold_train.simulate.regions import regions_compiled
from cpfold_train.simulate.shortened import Shortened, weights_come_and_go
from cpfold_train.simulate.trace import Moment, Phase, TracedLedger, Tracer
from cpfold_train.simulate.work_counter import Speed, WorkCounters, combined
from cpfold_train.training.apply import block_bytes, prepare_module
from cpfold_train.training.fsdp import shard_model
from cpfold_train.training.module import CoFoldingModule

SAMPLING_STEPS = 3
"""Steps of sampling that are traced: the second stands for all that are left out."""


@dataclass(frozen=True)
class Trace:
    """What a step of one rank does.

    Attributes:
        moments: what it holds at the peak of each phase.
        counters: its work, with ``recycling`` recycling passes and ``sampling`` steps of sampling.
        cycle: work of a recycling pass; empty where there are none.
        sampling_step: work of a step of sampling; empty where there are none.
    """

    moments: dict[Phase, Moment]
    counters: WorkCounters
    cycle: WorkCounters
    recycling: int
    sampling_step: WorkCounters
    sampling: int


def trace_step(
    config: TrainConfig,
    grid: Grid,
    batch: dict[str, Tensor],
    speed: Speed,
    on_host: bool,
    large_bytes: int = LARGE_BYTES,
    device: str = "cpu",
) -> Trace:
    """One micro-batch and one step of the optimizer, as they are from the second step on.

    Args:
        config: of the run; with kernels that are chosen, not ``auto``.
        grid: with the rank whose step it is.
        batch: its features; see :mod:`cpfold_train.simulate.batch`.
        speed: what kernels and messages take.
        on_host: whether it runs on CPU, where memory of small tensors is kept when they are freed.
        large_bytes: size from which on they are not small; see :mod:`cpfold_train.memory`.
        device: type of the device that the tensors say they are on.
    """
    recycling = min(1, config.model.recycling_steps)
    sampling = min(SAMPLING_STEPS, config.diffusion.sampling_steps)
    module = build(replace(config, diffusion=replace(config.diffusion, sampling_steps=sampling)))
    with without_contents(module, config, grid, speed, on_host, large_bytes, device) as (cp, tracer):
        optimizer = keep_between_steps(module, config, tracer)
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
        passes = PassTracer(tracer, module.model)
        fed = features(batch, tracer, device)
        with autocast(config, device):
            loss = module.micro_batch(fed, recycling)["loss"]
        if config.parallel.fsdp and config.trainer.accumulate_grad_batches == 1:
            optimizer.zero_grad()
        loss.backward()
        # What the optimizer adds has been counted: it moves weights in place, and its work follows from their number.
        return passes.trace(recycling, sampling)


def build(config: TrainConfig) -> CoFoldingModule:
    """The module that is trained, on the meta device."""
    with torch.device("meta"):
        return prepare_module(config)


@contextmanager
def without_contents(
    module: CoFoldingModule,
    config: TrainConfig,
    grid: Grid,
    speed: Speed,
    on_host: bool,
    large_bytes: int = LARGE_BYTES,
    device: str = "cpu",
) -> Iterator[tuple[ContextParallel, Tracer]]:
    """Inside, the module's weights are on the device, tensors have no contents, other ranks are not there, and all that
    is done is counted. Arguments are those of :func:`trace_step`."""
    tracer = Tracer(speed, large_bytes if on_host else 0)
    with (
        fake_world(grid, config.cp.algorithm, config.kernels, device) as cp,
        _sharded(module, cp) if config.parallel.fsdp else nullcontext(),
        _blocks_of(block_bytes(config.memory), not on_host),
        FakeTensorMode(allow_non_fake_inputs=True),
        tracer,
        dry(Shortened(tracer, on_host)),
        weights_come_and_go(tracer),
        cuequivariance_counted(tracer),
        regions_compiled(tracer) if config.compile else nullcontext(),
    ):
        with tracer.category("parameters"):
            module.to_empty(device=device)
        cp.ledger = TracedLedger(tracer)
        yield cp, tracer


def keep_between_steps(module: CoFoldingModule, config: TrainConfig, tracer: Tracer) -> Optimizer:
    """Make what a run keeps beside its weights from the end of its first step on; the module holds it."""
    trained = [x for x in module.parameters() if x.requires_grad]
    with tracer.category("gradients"):
        # DistributedDataParallel has room for all of them from the start. With FSDP they are there from the step or
        # the micro-batch before, until they are zeroed.
        for weight in trained:
            weight.grad = torch.empty_like(weight)
    if config.optim.ema_decay:
        with tracer.category("average"):
            module.averaged = [torch.empty_like(x) for x in trained]
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        # One kernel instead of thousands: what is kept is the same.
        group["fused"] = True
    with tracer.category("optimizer"):
        optimizer.step()
    module.optimizer = optimizer
    return optimizer


def features(batch: dict[str, Tensor], tracer: Tracer, device: str) -> dict[str, Tensor]:
    """What the model is fed with, on the device; counting starts with it."""
    tracer.reset()
    with tracer.category("features"):
        fed = {name: torch.empty_like(x, device=device) for name, x in batch.items() if name != ON_HOST}
    return fed | {ON_HOST: batch[ON_HOST]}


def autocast(config: TrainConfig, device: str) -> AbstractContextManager:
    """Mixed precision where the run has it."""
    return torch.autocast(device, torch.bfloat16) if config.trainer.precision in IN_BF16 else nullcontext()


class PassTracer:
    """Tells passes through the trunk and steps of sampling apart.

    Args:
        tracer: counts.
        model: is watched from now on.
    """

    def __init__(self, tracer: Tracer, model: CoFolding) -> None:
        self._tracer = tracer
        self._cycles: list[WorkCounters] = []
        self._samplings: list[WorkCounters] = []
        tracer.watch(model)
        # What a pass through the trunk begins with, and each step of sampling.
        model.trunk.s_norm.register_forward_pre_hook(lambda *_: self._cycles.append(tracer.so_far()))
        model.structure_module.score_model.register_forward_pre_hook(
            lambda *_: None if torch.is_grad_enabled() else self._samplings.append(tracer.so_far())
        )

    def trace(self, recycling: int, sampling: int) -> Trace:
        """All that was done, with so many recycling passes and steps of sampling."""
        moments, counters = self._tracer.moments(), self._tracer.so_far()
        # Samples may go through the module in several groups.
        calls = len(self._samplings) // sampling if sampling else 0
        return Trace(
            moments,
            counters,
            combined(self._cycles[1], self._cycles[0], -1) if recycling else {},
            recycling,
            combined(self._samplings[2 * calls], self._samplings[calls], -1) if sampling > 2 and calls else {},
            sampling,
        )


@contextmanager
def _sharded(module: CoFoldingModule, cp: ContextParallel) -> Iterator[None]:
    shard_model(module.model, cp)
    yield


@contextmanager
def _blocks_of(size: int | None, as_on_gpu: bool) -> Iterator[None]:
    """Tensors are on the CPU in name only: what a GPU takes at a time has to be said."""
    set_block_bytes(size, as_on_gpu)
    try:
        yield
    finally:
        set_block_bytes(None)
