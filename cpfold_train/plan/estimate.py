"""From what a step does to how long it takes and whether it fits, by assumptions that are listed with every plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpfold_train.devices import Device
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.depth import totals
from cpfold_train.plan.step import Trace
from cpfold_train.plan.trace import Seconds, Tally
from cpfold_train.training.config import TrainConfig

MATMUL_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.8
KERNEL_S, MESSAGE_S = 5e-6, 1e-5
EXPOSED_SHARE = 0.5
MEMORY_MARGIN = 0.1
ASSUMPTIONS = (
    f"a kernel takes as long as its matrix products at {MATMUL_SHARE:.0%} of the peak of their dtype, or as its reads "
    f"and writes at {MEMORY_SHARE:.0%} of the memory's bandwidth, whichever is longer, and {KERNEL_S * 1e6:.0f} "
    "microseconds at least",
    f"messages travel at {LINK_SHARE:.0%} of a link's bandwidth and take {MESSAGE_S * 1e6:.0f} microseconds each; "
    "those to other machines, evenly spread over all ranks of the grid, go over the network",
    f"{EXPOSED_SHARE:.0%} of that time is not hidden behind arithmetic; the all-reduce of gradients, or what FSDP "
    "sends, is hidden behind half of the step",
    f"what goes to the host and back travels beside the arithmetic at {LINK_SHARE:.0%} of the bandwidth of that link",
    "as many recycling passes as are drawn on average, and no waiting for data",
    f"{MEMORY_MARGIN:.0%} of the memory is left for the driver, NCCL and fragmentation",
)
"""What an estimate of time and of what fits rests on. None of it was measured on a GPU."""


@dataclass(frozen=True)
class Costs:
    """Of an optimizer step on one rank.

    Attributes:
        work: arithmetic, traffic and messages.
        gradient_bytes: sent to sum gradients over the world, or by FSDP to gather weights and to share out gradients.
        compute_s, exchange_s, gradients_s, host_s: seconds of each alone; the last are copies to the host and back.
        step_s: seconds in all.
    """

    work: Tally
    gradient_bytes: float
    compute_s: float
    exchange_s: float
    gradients_s: float
    host_s: float
    step_s: float


def kernel_seconds(device: Device) -> Seconds:
    """Time of a kernel on a device."""
    peaks = {torch.bfloat16: device.bf16, torch.float16: device.bf16, torch.float64: device.fp32 / 2}

    def seconds(flops: float, dtype: torch.dtype, moved_bytes: float) -> float:
        compute = flops / (MATMUL_SHARE * peaks.get(dtype, device.fp32))
        return max(KERNEL_S, compute, moved_bytes / (MEMORY_SHARE * device.bandwidth))

    return seconds


def step_work(trace: Trace, config: TrainConfig) -> Tally:
    """The work of an optimizer step with as many recycling passes as are drawn on average."""
    work = totals(trace.tallies)
    work = work.plus(totals(trace.cycle), config.model.recycling_steps / 2 - trace.recycling)
    work = work.plus(totals(trace.sampling_step), config.diffusion.sampling_steps - trace.sampling)
    return Tally().plus(work, config.trainer.accumulate_grad_batches)


def estimate(trace: Trace, config: TrainConfig, grid: Grid, device: Device, trained_bytes: float) -> Costs:
    """What an optimizer step costs on one rank of ``grid``.

    Args:
        trained_bytes: of all weights that are trained.
    """
    work, world = step_work(trace, config), grid.world_size
    # Ranks of one machine are neighbours: of P - 1 others, so many are elsewhere.
    away = max(0, grid.cp_size - device.per_node) / max(1, grid.cp_size - 1)
    sent = sum(work.sent_bytes.values())
    exchange = sent * (away / device.network + (1 - away) / device.link) / LINK_SHARE
    exchange += MESSAGE_S * sum(work.messages.values())
    if config.parallel.fsdp:
        gradient_bytes, own_bytes = work.shared_bytes, trained_bytes / world
    else:
        # A ring all-reduce sends every byte twice.
        gradient_bytes, own_bytes = 2 * trained_bytes * (world - 1) / world, trained_bytes
    # One link of each machine carries the ring to the next.
    line = device.link if world <= device.per_node else device.network * device.per_node
    gradients = gradient_bytes / (LINK_SHARE * line)
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    compute = work.seconds + 7 * own_bytes / (MEMORY_SHARE * device.bandwidth)
    host = work.host_bytes / (LINK_SHARE * device.host_link)
    exposed = EXPOSED_SHARE * exchange + max(0.0, gradients - compute / 2)
    return Costs(work, gradient_bytes, compute, exchange, gradients, host, max(compute, host) + exposed)
