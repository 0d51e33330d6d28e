"""Moving boxes of a sharded tensor between ranks, with gradients.

What overlaps with a redistribution is computed between :func:`start` and :func:`finish`. Who sends which box to whom is
an :class:`~cpfold_train.parallel.exchange_plan.ExchangePlan`; the backward pass goes the same ways back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange_plan import ExchangePlan, GradInFlight, InFlight, Layout


@dataclass(frozen=True)
class Pending:
    """A redistribution between :func:`start` and :func:`finish`, which yields its result."""

    _out: Tensor
    _trip: _Trip | None


def redistribute(
    x: Tensor, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, wants: Layout, op: str
) -> Tensor:
    """:func:`start` and :func:`finish` in one go, for exchanges with nothing to overlap."""
    return finish(start(x, cp, axis, dims, has, wants, op))


def start(
    x: Tensor, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, wants: Layout, op: str
) -> Pending:
    """Post the redistribution of a sharded tensor and return while it travels.

    In the backward pass the roles swap: :func:`finish` posts the gradient's way back and ``start`` waits for it, so
    what overlapped forward overlaps backward.

    Args:
        x: this rank's box; any strides, the pack into messages makes it contiguous.
        cp: the running grid.
        axis: the ranks among which it moves. Nothing is communicated on an axis of size 1.
        dims: the dims of ``x`` that the boxes describe, none negative; the others are whole on every rank.
        has: the box of each rank before. Boxes may be equal on several ranks only if a rank wants none of the others'.
        wants: the box of each rank after. They may overlap; every index must be had by exactly one rank of the axis.
        op: name for the ledger and for errors.

    Returns:
        Handle for :func:`finish`, whose result has the shape of ``wants[axis.index]`` in ``dims``.
    """
    if axis.size == 1:
        return Pending(x, None)
    trip = _Trip(ExchangePlan(cp, axis, dims, has, wants, op))
    return Pending(_Start.apply(x, trip), trip)


def finish(pending: Pending) -> Tensor:
    """Wait for a redistribution and return this rank's new box."""
    return pending._out if pending._trip is None else _Finish.apply(pending._out, pending._trip)


def finish_added(parts: Sequence[Pending], z: Tensor, row_factors: Tensor | None) -> Tensor:
    """``z + row_factors * update`` where the update comes in parts of dim 1, without joining or scaling it first.

    Args:
        parts: of the update (B, r, ..., c), in the order of their rows; none of them is used otherwise.
        z: (B, r, ..., c).
        row_factors: (B, r, 1, 1) or (B, 1, n, 1), or None for 1.

    Returns:
        (B, r, ..., c) in the dtype and with the strides of ``z``.
    """
    return _FinishAdded.apply(z, row_factors, [part._trip for part in parts], *(part._out for part in parts))


def sum_to_owners(
    x: Tensor, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, owns: Layout, op: str
) -> Tensor:
    """The transpose of :func:`redistribute`: what several ranks have of an index is summed on the rank that owns it.

    Args:
        x: this rank's addends, of the box ``has[axis.index]`` in ``dims``.
        has: the box for which each rank has addends; boxes may overlap.
        owns: the box whose sums each rank is to have; every index is owned by exactly one rank of the axis.
        cp, axis, dims, op: as for :func:`start`. On an axis of size 1 nothing moves, and the two boxes must be equal.

    Returns:
        The sums, of the shape of ``owns[axis.index]`` in ``dims``; zero where no rank has an addend.
    """
    return x if axis.size == 1 else _SumToOwners.apply(x, ExchangePlan(cp, axis, dims, owns, has, op))


def all_reduce(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Sum over the ranks of an axis; the result is the same on all of them.

    The gradient of a replicated value is a partial sum on each rank, so the backward is an all-reduce too.
    """
    return x if axis.size == 1 else _AllReduce.apply(x, cp, axis, op)


def all_reduce_max(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Maximum over the ranks of an axis, without gradient."""
    return x.detach() if axis.size == 1 else _reduced(x, cp, axis, op, dist.ReduceOp.MAX)


class _Trip:
    """What :func:`start` and :func:`finish` have in common: a plan, and what of it is in flight, there or back."""

    def __init__(self, plan: ExchangePlan) -> None:
        self._plan = plan
        self._flight: InFlight | GradInFlight | None = None

    def send_forward(self, x: Tensor) -> Tensor:
        """Post x; returns what :meth:`wait` fills in."""
        self._flight = self._plan.send_forward(x)
        return self._flight.out

    def send_grad(self, grad: Tensor) -> None:
        """Post a gradient."""
        self._flight = self._plan.send_grad(grad)

    def wait(self) -> Tensor:
        """What was in flight. Autograd keeps the trip with the graph of the result, which it must not hold itself."""
        flight, self._flight = self._flight, None
        return flight.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.send_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        ctx.mark_dirty(out)
        return trip.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.send_grad(grad)
        return grad, None


class _FinishAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, factors: Tensor | None, trips: list[_Trip | None], *outs: Tensor) -> Tensor:
        ctx.factors, ctx.trips, ctx.dtypes = factors, trips, [out.dtype for out in outs]
        ctx.sizes = [out.shape[1] for out in outs]
        new = torch.empty_like(z)
        for trip, out, rows in zip(trips, outs, _slices(ctx.sizes)):
            update = out if trip is None else trip.wait()
            if factors is None:
                torch.add(z[:, rows], update, out=new[:, rows])
            else:
                torch.addcmul(z[:, rows], update, _of_rows(factors, rows), out=new[:, rows])
        return new

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = []
        for trip, dtype, rows in zip(ctx.trips, ctx.dtypes, _slices(ctx.sizes)):
            part = grad[:, rows]
            # Contiguous whatever the strides of z: messages are made of it.
            back.append(part.new_empty(part.shape, dtype=dtype))
            if ctx.factors is None:
                back[-1].copy_(part)
            else:
                torch.mul(part, _of_rows(ctx.factors, rows), out=back[-1])
            if trip is not None:
                trip.send_grad(back[-1])
        return grad, None, None, *back


def _slices(sizes: list[int]) -> Iterator[slice]:
    ends = list(accumulate(sizes, initial=0))
    return map(slice, ends, ends[1:])


def _of_rows(factors: Tensor, rows: slice) -> Tensor:
    return factors if factors.shape[1] == 1 else factors[:, rows]


class _SumToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        return plan.send_grad(x).wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.send_forward(grad).wait(), None


def _reduced(x: Tensor, cp: ContextParallel, axis: Axis, op: str, reduce_op: dist.ReduceOp) -> Tensor:
    out = x.detach().contiguous().clone()
    # A ring all-reduce sends each element 2 (n - 1) / n times.
    cp.ledger.sent(op, 2 * (axis.size - 1) * out.numel() * out.element_size() // axis.size, 2 * (axis.size - 1))
    with cp.ledger.waiting(op, out.device, cp.ledger.arrival()):
        dist.all_reduce(out, reduce_op, group=axis.group)
    return out


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
        ctx.args = (cp, axis, op)
        return _reduced(x, cp, axis, op, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduced(grad, *ctx.args, dist.ReduceOp.SUM), None, None, None
