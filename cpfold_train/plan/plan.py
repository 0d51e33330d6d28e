"""The plan of one run on one grid of one kind of device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import psutil
from torch import Tensor, nn

from cpfold_train.config.schema import TrainConfig
from cpfold_train.data.stream.padding import GPU_MULTIPLE
from cpfold_train.devices import Device, find_device, kernels_on
from cpfold_train.errors import ConfigError
from cpfold_train.kernels.choice import Choice
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.depth import (
    FEWEST,
    by_category,
    by_module,
    extrapolated,
    groups_of,
    shallow,
    smallest,
    with_known,
)
from cpfold_train.plan.estimate import MEMORY_MARGIN, Costs, estimate, estimate_forward, speed_of
from cpfold_train.plan.forward import trace_prediction, trace_validation
from cpfold_train.plan.step import Trace, build, trace_step
from cpfold_train.predict import PRECISIONS
from cpfold_train.simulate.batch import assumed_batch, feature_bytes
from cpfold_train.simulate.trace import CATEGORIES, STEP, Moment

GIB, MIB = 2**30, 2**20
FIRST_USE = 64 * MIB
"""What a process on CPU takes in its first step whatever the size: pages of libraries, threads, sockets. Measured."""


@dataclass(frozen=True)
class Plan:
    """What a run needs of one rank.

    Attributes:
        config: of the run.
        grid: with the rank.
        device: name of the device.
        parameters: number of weights.
        held_at_peak: bytes held at the peak, by category and module.
        phase: what runs at that moment.
        costs: of an optimizer step.
        memory: bytes of the device.
        kernels: those that are planned with, and why.
        what: is planned.
        process: bytes that the process takes beside tensors, of the same memory: on CPU.
    """

    config: TrainConfig
    grid: Grid
    device: str
    parameters: int
    held_at_peak: Moment
    phase: str
    costs: Costs
    memory: float
    kernels: Choice
    what: str = "one optimizer step"
    process: float = 0

    @property
    def peak(self) -> float:
        """Bytes held at the peak."""
        return sum(self.held_at_peak.values())

    @property
    def fits(self) -> bool:
        """Whether that leaves a margin."""
        return self.peak + self.process <= (1 - MEMORY_MARGIN) * self.memory

    @property
    def host_memory(self) -> float:
        """Bytes that the host keeps for a rank with ``memory.offload``: all that goes there, and comes back, in a
        micro-batch."""
        return self.costs.work.host_bytes / 2 / self.config.trainer.accumulate_grad_batches

    def as_dict(self) -> dict:
        """For ``--json``: GiB, MiB, seconds and operations of one rank."""
        held, made, work = by_category(self.held_at_peak), by_module(self.held_at_peak), self.costs.work
        return {
            "of": self.what,
            "device": self.device,
            "grid": str(self.grid),
            "dp": self.grid.dp,
            "gpus": self.grid.world_size,
            "crop_size": self.config.crop_size,
            "memory": asdict(self.config.memory),
            "parameters": self.parameters,
            "peak_memory_gib": self.peak / GIB,
            "process_memory_gib": self.process / GIB,
            "device_memory_gib": self.memory / GIB,
            "host_memory_gib": self.host_memory / GIB,
            "fits": self.fits,
            "peak_in": self.phase,
            "by_category": {name: held[name] / GIB for name in CATEGORIES},
            "by_module": {name: size / GIB for name, size in made.most_common()},
            "sent_mib_per_step": sum(work.sent_bytes.values()) / MIB,
            "sent_mib_by_op": {op: size / MIB for op, size in work.sent_bytes.most_common() if size},
            "gradients_mib_per_step": self.costs.gradient_bytes / MIB,
            "flops": sum(work.flops.values()),
            "kernels": {"name": self.kernels.name, "why": self.kernels.why},
            "launches": round(work.kernels),
            "compute_s": self.costs.compute_s,
            "exchange_s": self.costs.exchange_s,
            "waited_s": self.costs.work.waited_s,
            "host_s": self.costs.host_s,
            "step_s_estimate": self.costs.step_s,
            "by_operation": [
                {
                    "module": part.module,
                    "operation": part.operation,
                    "seconds": cost.seconds,
                    "exchange_s": cost.exchange_s,
                    "bound_by": cost.bound,
                    "floor_s": cost.floor_s,
                    "launches": round(cost.work.kernels),
                    "flops": sum(cost.work.flops.values()),
                    "exps": cost.work.exps,
                    "moved_bytes": cost.work.moved_bytes,
                    "sent_bytes": sum(cost.work.sent_bytes.values()),
                }
                for part, cost in sorted(self.costs.parts.items(), key=lambda item: -item[1].seconds)
            ],
            "launches_by_module": {module: round(n) for module, n in launches_by_module(self.costs).most_common()},
        }


def plan(config: TrainConfig, grid: Grid, device: str) -> Plan:
    """Plan a training step.

    Args:
        config: of the run.
        grid: with the rank to plan for.
        device: one of :data:`cpfold_train.devices.DEVICES`; or ``cpu``, where times mean little; or a file.

    Raises:
        ConfigError: there is no such device.
    """
    process = process_bytes() if device == "cpu" else 0
    found = find_device(device, grid.world_size)
    config, kernels = _with_kernels(config, found, device)
    module = build(config)
    traced = _traced(trace_step, config, module, grid, found, device)
    phase, held = peak_moment(traced)
    trained_bytes = sum(x.nbytes for x in module.parameters() if x.requires_grad)
    costs = estimate(traced, config, grid, found, trained_bytes)
    return Plan(config, grid, device, _parameters(module), held, phase, costs, found.memory, kernels, process=process)


def plan_prediction(config: TrainConfig, grid: Grid, device: str) -> Plan:
    """Plan the prediction of one query of ``crop_size`` tokens, as the ``predict`` command makes it.

    Args:
        config: ``diffusion.samples``, ``diffusion.sampling_steps``, ``model.recycling_steps`` and
            ``data.max_msa_rows`` are those of the prediction, as its options say them.
        grid, device: as for :func:`plan`.

    Raises:
        ConfigError: there is no such device, or predictions are not made in this precision.
    """
    if config.trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={config.trainer.precision} is none of a prediction: type trainer.precision="
            + " or trainer.precision=".join(PRECISIONS)
        )
    found = find_device(device, grid.world_size)
    config = replace(config, memory=MemoryConfig(), parallel=replace(config.parallel, fsdp=False))
    config, kernels = _with_kernels(config, found, device)
    module = build(config)
    traced = _traced(trace_prediction, config, module, grid, found, device)
    phase, held = peak_moment(traced)
    costs, what = estimate_forward(traced, config, grid, found), "the prediction of one query"
    return Plan(config, grid, device, _parameters(module), held, phase, costs, found.memory, kernels, what)


def validation_moment(config: TrainConfig, grid: Grid, device: str) -> Moment:
    """What is held at the peak of validation, beside what the run keeps between its steps."""
    found = find_device(device, grid.world_size)
    config, _ = _with_kernels(config, found, device)
    return peak_moment(_traced(trace_validation, config, build(config), grid, found, device))[1]


def _with_kernels(config: TrainConfig, found: Device, device: str) -> tuple[TrainConfig, Choice]:
    kernels = kernels_on(found, device, config.kernels, config.trainer.precision)
    return replace(config, kernels=kernels.name), kernels


def _traced(
    trace: Callable[..., Trace], config: TrainConfig, module: nn.Module, grid: Grid, found: Device, device: str
) -> Trace:
    """The trace of a deep model, ``module``, from those of two shallow ones, where that can be."""
    speed, on_host = speed_of(found, grid, config.tf32), device == "cpu"

    def traced(config: TrainConfig) -> Trace:
        return trace(config, grid, assumed_batch(config, grid, 1 if on_host else GPU_MULTIPLE), speed, on_host)

    # What malloc keeps does not grow block by block: on CPU, where models are small, all blocks run.
    groups = None if on_host else groups_of(config)
    if groups is None:
        return traced(config)
    runs = (traced(shallow(config, n)) for n in (FEWEST, FEWEST + 1))
    return extrapolated(*runs, groups, config.data.max_templates, _known_bytes(module, config, grid))


def least_held(config: TrainConfig, grid: Grid, device: str) -> float:
    """Bytes that a training step holds at its peak at the least, from a model of one block of each kind; 0 where a
    plan of the whole model takes hardly longer than that, or all its blocks have to run. Arguments as of :func:`plan`.
    """
    if device == "cpu" or groups_of(config) is None:
        return 0
    found = find_device(device, grid.world_size)
    config, _ = _with_kernels(config, found, device)
    one = smallest(config)
    trace = trace_step(one, grid, assumed_batch(one, grid, GPU_MULTIPLE), speed_of(found, grid), on_host=False)
    known = _known_bytes(build(config), config, grid)
    return max(sum(with_known(moment, known).values()) for moment in trace.moments.values())


def _known_bytes(module: nn.Module, config: TrainConfig, grid: Grid) -> dict[str, float]:
    """What weights and features of the whole model take on a GPU, by category."""
    features = {"features": feature_bytes(assumed_batch(config, grid, GPU_MULTIPLE))}
    return weight_bytes(module, config, grid) | features


@cache
def process_bytes() -> float:
    """What a rank of a run on CPU takes beside tensors: as much as this process before it plans, which has imported
    what a run does, and ``FIRST_USE``."""
    return psutil.Process().memory_info().rss + FIRST_USE


def _parameters(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def launches_by_module(costs: Costs) -> Counter[str]:
    """Kernels that a step launches."""
    launches: Counter[str] = Counter()
    for part, cost in costs.parts.items():
        launches[part.module] += cost.work.kernels
    return launches


def weight_bytes(module: nn.Module, config: TrainConfig, grid: Grid) -> dict[str, float]:
    """Bytes of a rank's weights, and of what is kept beside them from step to step, by category."""
    ranks = grid.world_size if config.parallel.fsdp else 1

    def own(x: Tensor) -> int:
        """FSDP shards rows, and rounds them up."""
        return -(-x.shape[0] // ranks) * (x.nbytes // x.shape[0])

    weights = list(module.parameters())
    trained = [x for x in weights if x.requires_grad]
    # Adam's two moments, and a count of steps.
    held = {"optimizer": sum(2 * own(x) + 4 for x in trained)}
    held["parameters"] = sum(map(own, weights)) + sum(x.nbytes for x in module.buffers())
    held["average"] = sum(map(own, trained)) if config.optim.ema_decay else 0
    held["gradients"] = sum(map(own, trained))
    return held


def peak_moment(trace: Trace) -> tuple[str, Moment]:
    """When a step holds most, and what."""
    (turning, running), moment = max(trace.moments.items(), key=lambda entry: sum(entry[1].values()))
    return f"{running}, {'forward' if turning == STEP else 'backward'} pass", moment
