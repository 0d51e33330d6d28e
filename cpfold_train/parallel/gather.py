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


def gather_figures(cp: ContextParallel, figures: Sequence[float]) -> Tensor:
    """A row of figures from every rank of the world: (world_size, len(figures)) float64 on the host."""
    row = torch.tensor(figures, dtype=torch.float64)
    if cp.grid.world_size == 1:
        return row[None]
    row = row.to(cp.mesh.device_type)
    pieces = [torch.empty_like(row) for _ in range(cp.grid.world_size)]
    with cp.ledger.standing("gathering of figures"):
        dist.all_gather(pieces, row)
        # Over NCCL it is here that the host waits.
        return torch.stack(pieces).cpu()


def on_any_rank(cp: ContextParallel, flag: bool) -> bool:
    """Whether it is so on at least one rank of the world; the same answer on all."""
    if cp.grid.world_size == 1:
        return flag
    flags = torch.tensor(flag, dtype=torch.int32, device=cp.mesh.device_type)
    with cp.ledger.standing("agreement"):
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)


def barrier(cp: ContextParallel) -> None:
    """Wait until every rank of the world is here."""
    if cp.grid.world_size > 1:
        with cp.ledger.standing("barrier"):
            dist.barrier()
