"""Small values from every rank, for metrics and reports. Nothing here carries gradients or belongs in the hot path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cpfold_train.parallel.context import Axis, ContextParallel


def gather_tensor(x: Tensor, axis: Axis) -> Tensor:
    """``x`` of every rank of an axis, stacked: (axis.size, *x.shape). All ranks must give the same shape and dtype."""
    if axis.size == 1:
        return x[None]
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(pieces, x.contiguous(), group=axis.group)
    return torch.stack(pieces)


def gather_to_first(x: Tensor, axis: Axis) -> Tensor | None:
    """``x`` of every rank of an axis, stacked (axis.size, *x.shape), on the first of them; None on the others."""
    if axis.size == 1:
        return x[None]
    if axis.index:
        dist.gather(x.contiguous(), dst=axis.ranks[0], group=axis.group)
        return None
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in axis.ranks]
    dist.gather(x.contiguous(), pieces, dst=axis.ranks[0], group=axis.group)
    return torch.stack(pieces)


def gather_on_hosts(x: Tensor, cp: ContextParallel, what: str) -> Tensor:
    """``x``, which is on the host, of every rank of the world, stacked: (world_size, *x.shape). No GPU is waited for.

    Args:
        what: is done, to tell where a rank is.
    """
    if cp.grid.world_size == 1:
        return x[None]
    pieces = [torch.empty_like(x) for _ in range(cp.grid.world_size)]
    with cp.ledger.standing(what):
        dist.all_gather(pieces, x, group=cp.hosts)
    return torch.stack(pieces)


def gather_numbers(cp: ContextParallel, numbers: Sequence[float]) -> Tensor:
    """A row of numbers from every rank of the world: (world_size, len(numbers)) float64 on the host."""
    return gather_on_hosts(torch.tensor(numbers, dtype=torch.float64), cp, "gathering of numbers")


def on_any_rank(cp: ContextParallel, flag: bool) -> bool:
    """Whether it is so on at least one rank of the world; the same answer on all."""
    return bool(gather_on_hosts(torch.tensor(flag, dtype=torch.int32), cp, "agreement").any())


def barrier(cp: ContextParallel) -> None:
    """Wait until every rank of the world is here."""
    if cp.grid.world_size > 1:
        with cp.ledger.standing("barrier"):
            dist.barrier()
