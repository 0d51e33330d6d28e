"""From what a step does to how long it takes and whether it fits, by assumptions that are listed with every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpfold_train.config.schema import TrainConfig
from cpfold_train.devices import Device
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.step import Trace
from cpfold_train.simulate.work_counter import (
    EXPONENTIALS,
    L2,
    LAUNCHES,
    LINK,
    MATRIX,
    MEMORY,
    Kernel,
    Part,
    Seconds,
    Speed,
    WorkCounter,
    WorkCounters,
    combined,
    totals,
)

MATMUL_EFFICIENCY, LARGE_MATMUL_EFFICIENCY = 0.5, 0.7
MEMORY_EFFICIENCY, EXP_EFFICIENCY, LINK_EFFICIENCY = 0.8, 0.75, 0.8
"""Of the peaks. The second is that of large square products, as those of triangle multiplication, which libraries take
at about 700 TFLOP/s on an H100; products with 128 channels or fewer reach less. An exponential takes a multiprocessor
as long as it takes to issue 8 instructions of a thread. The loops of triangle attention that exponentials bound have,
as compiled for sm_90, 8.4 for a score in the forward pass and 6.1 in the kernel for the bias's gradient, which leaves
95 % of the exponentials at least; 80 % of that are taken to be reached, as of memory."""
L2_EFFICIENCY = 0.8
"""Of what streams from L2 were measured to reach, which attention reads tile by tile."""
FLOOR_BF16, FLOOR_TF32, FLOOR_MEMORY, FLOOR_LINK = 700 / 989, 300 / 494, 3.0 / 3.35, 400 / 450
"""The most that large products, streams of memory and NCCL reach on an H100, of its peaks."""
LARGE = 1.7
"""A product is large where its operations take so many times as long as what it moves, both at the device's peaks: from
500 operations a byte in bf16 on an H100, and from 34 in fp32."""
KERNEL_S, LAUNCH_S, MESSAGE_S = 5e-6, 12e-6, 1e-5
MEMORY_MARGIN = 0.1
ASSUMPTIONS = (
    f"a kernel takes as long as its matrix products at {MATMUL_EFFICIENCY:.0%} of the peak of their dtype (large "
    f"ones at {LARGE_MATMUL_EFFICIENCY:.0%}), its reads and writes at {MEMORY_EFFICIENCY:.0%} of the memory's "
    f"bandwidth, its reads of L2 at {L2_EFFICIENCY:.0%} of what others measured, or its exponentials at "
    f"{EXP_EFFICIENCY:.0%} of their peak, whichever is longest, and {KERNEL_S * 1e6:.0f} microseconds at "
    "least; where a file says what was measured, that counts in full",
    f"the host takes {LAUNCH_S * 1e6:.0f} microseconds to launch a kernel, and an operation as long as its kernels or "
    "their launches, whichever is longer",
    f"messages travel at {LINK_EFFICIENCY:.0%} of a link's bandwidth and take {MESSAGE_S * 1e6:.0f} microseconds each; "
    "those to other machines, evenly spread over all ranks of the grid, go over the network",
    "they travel one after the other beside the computation, which waits where it wants what has not arrived; other "
    "ranks are as fast as this one; the all-reduce of gradients, or what FSDP sends, is hidden behind half of the step",
    "what goes to the host and back travels beside the arithmetic at "
    f"{LINK_EFFICIENCY:.0%} of the bandwidth of that link",
    "as many recycling passes as are drawn on average, and no waiting for data",
    f"{MEMORY_MARGIN:.0%} of the memory is left for the driver, NCCL and fragmentation",
)
"""What an estimate of time and of what fits rests on. None of it was measured on a GPU."""
FLOOR = (
    f"the floor of an operation is the longest of its products at {FLOOR_BF16:.0%} of the bf16 peak (fp32 ones at "
    f"{FLOOR_TF32:.0%} of the TF32 peak), its arguments and results once at {FLOOR_MEMORY:.0%} of the memory's "
    f"bandwidth, its exponentials at their peak, and what it sends at {FLOOR_LINK:.0%} of the link's bandwidth"
)
"""What a floor is; recomputed passes count in it."""


@dataclass(frozen=True)
class PartCosts:
    """Of one part of the model in an optimizer step.

    Attributes:
        work: what it computes, reads, writes and sends.
        compute_s: seconds of its kernels, or of their launches.
        exchange_s: seconds that it waits for messages.
        bound: what takes longest of it.
        floor_s: the least that this work can take.
    """

    work: WorkCounter
    compute_s: float
    exchange_s: float
    bound: str
    floor_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute_s + self.exchange_s


@dataclass(frozen=True)
class Costs:
    """Of an optimizer step on one rank.

    Attributes:
        work: arithmetic, traffic and messages.
        parts: the same by part of the model, with its time.
        gradient_bytes: sent to sum gradients over the world, or by FSDP to gather weights and reduce gradients.
        compute_s, exchange_s, gradients_s, host_s: seconds of each alone; the last are copies to the host and back.
        step_s: seconds in all.
    """

    work: WorkCounter
    parts: dict[Part, PartCosts]
    gradient_bytes: float
    compute_s: float
    exchange_s: float
    gradients_s: float
    host_s: float
    step_s: float


def kernel_seconds(device: Device, tf32: bool = False) -> Seconds:
    """Time of a kernel on a device; with ``tf32`` matrix products in fp32 go through TF32."""
    rates, half = device.measured, (torch.bfloat16, torch.float16)
    peaks = dict.fromkeys(half, device.bf16) | {torch.float64: device.fp32 / 2}
    peaks[torch.float32] = device.tf32 if tf32 else device.fp32
    reached = dict.fromkeys(half, rates.bf16_flops)
    reached[torch.float32] = rates.tf32_flops if tf32 else rates.fp32_flops
    bandwidth, exps = (
        rates.memory_bytes_s or MEMORY_EFFICIENCY * device.bandwidth,
        rates.exp_s or EXP_EFFICIENCY * device.exps,
    )
    l2 = L2_EFFICIENCY * device.l2

    def seconds(kernel: Kernel) -> tuple[str, float]:
        peak = peaks.get(kernel.dtype, device.fp32)
        large = not kernel.fused and kernel.flops / peak > LARGE * kernel.moved_bytes / device.bandwidth
        flops_s = reached.get(kernel.dtype) or (LARGE_MATMUL_EFFICIENCY if large else MATMUL_EFFICIENCY) * peak
        times = {
            LAUNCHES: KERNEL_S * kernel.launches,
            MATRIX: kernel.flops / flops_s,
            MEMORY: kernel.moved_bytes / bandwidth,
            L2: kernel.l2_bytes / l2,
            EXPONENTIALS: kernel.exps / exps,
        }
        bound = max(times, key=times.get)
        return bound, times[bound]

    return seconds


def message_seconds(device: Device, grid: Grid) -> Callable[[float, float], float]:
    """Time of so many bytes in so many messages between ranks of ``grid``."""
    # Ranks of one machine are neighbours: of P - 1 others, so many are elsewhere.
    away = max(0, grid.cp_size - device.per_node) / max(1, grid.cp_size - 1)
    link = device.measured.link_bytes_s or LINK_EFFICIENCY * device.link
    byte_s = away / (LINK_EFFICIENCY * device.network) + (1 - away) / link
    return lambda n_bytes, messages: n_bytes * byte_s + MESSAGE_S * messages


def speed_of(device: Device, grid: Grid, tf32: bool = False) -> Speed:
    """Time of kernels on a device, as :func:`kernel_seconds`, and of messages."""
    return Speed(kernel_seconds(device, tf32), message_seconds(device, grid))


def passes(trace: Trace, recycling: float, sampling: int) -> WorkCounters:
    """The work with so many recycling passes and steps of sampling."""
    work = combined(trace.counters, trace.cycle, recycling - trace.recycling)
    return combined(work, trace.sampling_step, sampling - trace.sampling)


def part_costs(work: WorkCounter, device: Device) -> PartCosts:
    """What a part costs on one rank."""
    times = dict(work.seconds)
    launch_s = LAUNCH_S if device.measured.launch_s is None else device.measured.launch_s
    if launch_s * work.kernels > sum(times.values()):
        times = {LAUNCHES: launch_s * work.kernels}
    times[LINK] = work.waited_s
    bound = max(times, key=times.get)
    return PartCosts(work, sum(times.values()) - times[LINK], times[LINK], bound, _floor(work, device))


def _floor(work: WorkCounter, device: Device) -> float:
    in_half = (torch.bfloat16, torch.float16)
    products = sum(
        flops / (FLOOR_BF16 * device.bf16 if dtype in in_half else FLOOR_TF32 * device.tf32)
        for dtype, flops in work.flops.items()
    )
    memory = work.least_bytes / (FLOOR_MEMORY * device.bandwidth)
    link = sum(work.sent_bytes.values()) / (FLOOR_LINK * device.link)
    return max(products, memory, work.exps / device.exps, link)


def estimate(trace: Trace, config: TrainConfig, grid: Grid, device: Device, trained_bytes: float) -> Costs:
    """What an optimizer step costs on one rank of ``grid``, with as many recycling passes as are drawn on average.

    Args:
        trained_bytes: of all weights that are trained.
    """
    counters = passes(trace, config.model.recycling_steps / 2, config.diffusion.sampling_steps)
    counters, world = combined({}, counters, config.trainer.accumulate_grad_batches), grid.world_size
    if config.parallel.fsdp:
        gradient_bytes, own_bytes = totals(counters).fsdp_bytes, trained_bytes / world
    else:
        # A ring all-reduce sends every byte twice.
        gradient_bytes, own_bytes = 2 * trained_bytes * (world - 1) / world, trained_bytes
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    return _costs(counters, grid, device, gradient_bytes, 7 * own_bytes)


def estimate_forward(trace: Trace, config: TrainConfig, grid: Grid, device: Device) -> Costs:
    """What the prediction of one query costs on one rank of ``grid``."""
    counters = passes(trace, config.model.recycling_steps, config.diffusion.sampling_steps)
    return _costs(counters, grid, device, 0, 0)


def _costs(counters: WorkCounters, grid: Grid, device: Device, gradient_bytes: float, optimizer_bytes: float) -> Costs:
    parts, work = {part: part_costs(counter, device) for part, counter in counters.items()}, totals(counters)
    # One link of each machine carries the ring to the next.
    line = device.link if grid.world_size <= device.per_node else device.network * device.per_node
    gradients = gradient_bytes / (LINK_EFFICIENCY * line)
    compute = sum(part.compute_s for part in parts.values()) + optimizer_bytes / (MEMORY_EFFICIENCY * device.bandwidth)
    exchange = message_seconds(device, grid)(sum(work.sent_bytes.values()), sum(work.messages.values()))
    host, exposed = (
        work.host_bytes / (LINK_EFFICIENCY * device.host_link),
        work.waited_s + max(0.0, gradients - compute / 2),
    )
    return Costs(work, parts, gradient_bytes, compute, exchange, gradients, host, max(compute, host) + exposed)
