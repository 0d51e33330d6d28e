"""The work of a step, counted by the part of the model that does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MATRIX, MEMORY, EXPONENTIALS, LINK, LAUNCHES = "matrix units", "memory", "exponentials", "link", "launches"
L2 = "L2 cache"
"""What can bound a kernel, or an operation of several."""

Seconds = Callable[["Kernel"], tuple[str, float]]
"""What bounds a kernel, and its time."""


class Speed(NamedTuple):
    """Of a device and its links.

    Attributes:
        kernel: what bounds a kernel, and its seconds.
        messages: seconds of so many bytes in so many messages, one after the other.
    """

    kernel: Seconds
    messages: Callable[[float, float], float]


class Kernel(NamedTuple):
    """One kernel, or the few that an operator starts.

    Attributes:
        flops: operations of its matrix products.
        dtype: in which they are made.
        moved_bytes: read from and written to the device's memory.
        exps: exponentials.
        launches: CUDA kernels that it starts.
        fused: whether it does more than a library's product.
        l2_bytes: read from L2, where that may be what bounds it.
    """

    flops: float
    dtype: torch.dtype
    moved_bytes: float
    exps: float = 0.0
    launches: int = 1
    fused: bool = False
    l2_bytes: float = 0.0


class Part(NamedTuple):
    """A module, all blocks of a stack together, and the operation within it; "" is what its operations do not do."""

    module: str
    operation: str = ""


@dataclass
class WorkCounter:
    """What one part does.

    Attributes:
        kernels: launches.
        flops: of matrix products, by their dtype.
        exps: exponentials.
        moved_bytes: read and written.
        least_bytes: of these, what no kernel can leave out: arguments and results of the operation, once, and in the
            backward pass the arguments, the gradient of the result, and the gradients of the arguments.
        seconds: time of the kernels, by what bounds them.
        host_bytes: copied to the host or from there.
        fsdp_bytes: sent by FSDP to gather weights and to scatter gradients.
        sent_bytes, messages: of context parallelism, by its operation.
        waited_s: seconds that the computation waits for messages.
    """

    kernels: float = 0
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    exps: float = 0
    moved_bytes: float = 0
    least_bytes: float = 0
    seconds: Counter[str] = field(default_factory=Counter)
    host_bytes: float = 0
    fsdp_bytes: float = 0
    sent_bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    waited_s: float = 0

    def add(self, kernel: Kernel, bound: str, seconds: float, times: float) -> None:
        """Count a kernel so many times, and the seconds that each of them takes."""
        self.kernels += times * kernel.launches
        if kernel.flops:
            self.flops[kernel.dtype] += times * kernel.flops
        self.exps += times * kernel.exps
        self.moved_bytes += times * kernel.moved_bytes
        self.seconds[bound] += times * seconds

    def plus(self, other: WorkCounter, times: float = 1) -> WorkCounter:
        """This and so many times the other."""

        def combined(mine: float | Counter, theirs: float | Counter) -> float | Counter:
            if isinstance(mine, Counter):
                # Not a set of keys, whose order is another in each process: it is that in which a plan lists them.
                return Counter({key: mine[key] + times * theirs[key] for key in dict.fromkeys([*mine, *theirs])})
            return mine + times * theirs

        return WorkCounter(*(combined(mine, theirs) for mine, theirs in zip(vars(self).values(), vars(other).values())))


WorkCounters = dict[Part, WorkCounter]
"""Work by part."""


def combined(counters: WorkCounters, more: WorkCounters, times: float) -> WorkCounters:
    """Part by part the one and so many times the other."""
    nothing = WorkCounter()
    return {part: counters.get(part, nothing).plus(more.get(part, nothing), times) for part in counters | more}


def totals(counters: WorkCounters) -> WorkCounter:
    """All parts together."""
    total = WorkCounter()
    for counter in counters.values():
        total = total.plus(counter)
    return total
