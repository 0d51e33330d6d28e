"""The plan of one run on one grid of one kind of device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from cpfold_train.devices import find_device
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.batch import assumed_batch, feature_bytes
from cpfold_train.plan.depth import FEWEST, by_category, by_module, extrapolated, groups_of, shallow
from cpfold_train.plan.estimate import MEMORY_MARGIN, Costs, estimate, kernel_seconds
from cpfold_train.plan.step import Trace, build, trace_step
from cpfold_train.plan.trace import CATEGORIES, STEP, Moment
from cpfold_train.training.config import TrainConfig

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Plan:
    """What a run needs of one rank.

    Attributes:
        config: of the run.
        grid: with the rank.
        device: name of the device.
        parameters: number of weights.
        fullest: bytes held at the fullest moment, by category and module.
        phase: what runs at that moment.
        costs: of an optimizer step.
        memory: bytes of the device.
    """

    config: TrainConfig
    grid: Grid
    device: str
    parameters: int
    fullest: Moment
    phase: str
    costs: Costs
    memory: float

    @property
    def peak(self) -> float:
        """Bytes held at the fullest moment."""
        return sum(self.fullest.values())

    @property
    def fits(self) -> bool:
        """Whether that leaves a margin."""
        return self.peak <= (1 - MEMORY_MARGIN) * self.memory

    def figures(self) -> dict:
        """For ``--json``: GiB, MiB, seconds and operations of one rank."""
        held, made, work = by_category(self.fullest), by_module(self.fullest), self.costs.work
        return {
            "device": self.device,
            "grid": str(self.grid),
            "dp": self.grid.dp,
            "crop_size": self.config.crop_size,
            "memory": asdict(self.config.memory),
            "parameters": self.parameters,
            "peak_memory_gib": self.peak / GIB,
            "device_memory_gib": self.memory / GIB,
            "fits": self.fits,
            "fullest_in": self.phase,
            "by_category": {name: held[name] / GIB for name in CATEGORIES},
            "by_module": {name: size / GIB for name, size in made.most_common()},
            "sent_mib_per_step": sum(work.sent_bytes.values()) / MIB,
            "sent_mib_by_op": {op: size / MIB for op, size in work.sent_bytes.most_common() if size},
            "gradients_mib_per_step": self.costs.gradient_bytes / MIB,
            "flops": sum(work.flops.values()),
            "kernels": round(work.kernels),
            "compute_s": self.costs.compute_s,
            "exchange_s": self.costs.exchange_s,
            "host_s": self.costs.host_s,
            "step_s_estimate": self.costs.step_s,
        }


def plan(config: TrainConfig, grid: Grid, device: str) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        grid: with the rank to plan for.
        device: one of :data:`cpfold_train.devices.DEVICES`, or ``cpu``, where times mean little.

    Raises:
        ConfigError: there is no such device.
    """
    found = find_device(device, grid.world_size)
    seconds, on_host = kernel_seconds(found), device == "cpu"
    module = build(config)

    def trace(config: TrainConfig) -> Trace:
        return trace_step(config, grid, assumed_batch(config, grid), seconds, on_host)

    # What malloc keeps does not grow block by block: on CPU, where models are small, all blocks run.
    groups = None if on_host else groups_of(config)
    if groups is None:
        traced = trace(config)
    else:
        runs = (trace(shallow(config, n)) for n in (FEWEST, FEWEST + 1))
        known = weight_bytes(module, config, grid) | {"features": feature_bytes(assumed_batch(config, grid))}
        traced = extrapolated(*runs, groups, config.data.max_templates, known)
    phase, fullest = fullest_moment(traced)
    parameters = sum(x.numel() for x in module.parameters())
    trained_bytes = sum(x.nbytes for x in module.parameters() if x.requires_grad)
    costs = estimate(traced, config, grid, found, trained_bytes)
    return Plan(config, grid, device, parameters, fullest, phase, costs, found.memory)


def weight_bytes(module: nn.Module, config: TrainConfig, grid: Grid) -> dict[str, float]:
    """Bytes of a rank's weights, and of what is kept beside them from step to step, by category."""
    ranks = grid.world_size if config.parallel.fsdp else 1

    def own(x: Tensor) -> int:
        """FSDP shares out rows, and rounds them up."""
        return -(-x.shape[0] // ranks) * (x.nbytes // x.shape[0])

    weights = list(module.parameters())
    trained = [x for x in weights if x.requires_grad]
    # Adam's two moments, and a count of steps.
    held = {"optimizer": sum(2 * own(x) + 4 for x in trained)}
    held["parameters"] = sum(map(own, weights)) + sum(x.nbytes for x in module.buffers())
    held["average"] = sum(map(own, trained)) if config.optim.ema_decay else 0
    held["gradients"] = sum(map(own, trained))
    return held


def fullest_moment(trace: Trace) -> tuple[str, Moment]:
    """When a step holds most, and what."""
    (turning, running), moment = max(trace.moments.items(), key=lambda entry: sum(entry[1].values()))
    return f"{running}, {'forward' if turning == STEP else 'backward'} pass", moment
