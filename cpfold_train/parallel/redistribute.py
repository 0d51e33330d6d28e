"""Moving blocks of a sharded tensor between ranks, with gradients.

Every distributed op of the trunk is described by two layouts: which box of the global tensor each rank *has* and which
box it *wants*. Rank p sends rank q the intersection of what p has and what q wants, and nothing else. All-to-all,
all-gather of even or uneven pieces and the gathering of a band of tiles are all of this form, on square and on
rectangular grids alike. The backward is the transpose: the gradient of a box travels back to the rank that has it and
is summed.

A box is a tuple of half-open intervals, one for each of the ``dims`` that the layouts speak of. Who sends which box to
whom is an :class:`ExchangePlan`, which knows of no tensor; a tensor on its way is :class:`InFlight`, and its gradient
:class:`GradInFlight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from cpfold_train.dry_run import each_message
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.grid import Interval

Box = tuple[Interval, ...]
Layout = tuple[Box, ...]
"""The box of each rank of an axis, in the order of the axis."""


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


class ExchangePlan:
    """Who sends what to whom in one redistribution and in its transpose: boxes and ranks, no tensor and no message.

    A plan may have any number of tensors in flight. What is done with it is outside of autograd.

    Args:
        cp, axis, dims, has, wants, op: as for :func:`start`; negative dims are not taken.

    Attributes:
        source: the box that this rank has.
        target: the box that it wants.
        sends: the boxes of ``source`` that ranks of the axis want, by their index; this rank's own is one of them.
        receives: the boxes of ``target`` that ranks of the axis have, likewise.
        disjoint: whether no index of ``source`` is wanted by two ranks, nor by none. Where it is, nothing is summed on
            the way back.
    """

    def __init__(
        self, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, wants: Layout, op: str
    ) -> None:
        self.cp, self.axis, self.dims, self.op = cp, axis, dims, op
        self.source, self.target = has[axis.index], wants[axis.index]
        self.sends, self.receives, self.disjoint = _boxes(axis.index, has, wants)

    def send_forward(self, x: Tensor, out: Tensor | None = None) -> InFlight:
        """Post the messages of ``x``, which covers ``source``.

        Args:
            x: must not change before the result is there: what is contiguous in it is sent from where it is.
            out: of the shape of ``target``, becomes the result; None makes it.
        """
        out = x.new_empty(self.shape(x, self.target)) if out is None else out
        exchange = self._post(x, self.source, self.sends, self.receives, self.target, out)
        if (me := self.axis.index) in self.sends:
            box = self.sends[me]
            self.view(out, self.target, box).copy_(self.view(x, self.source, box))
        return InFlight(self, exchange, out)

    def send_grad(self, grad: Tensor, out: Tensor | None = None) -> GradInFlight:
        """Post the gradient of what was wanted, which covers ``target``, on its way to the ranks that have it.

        Args:
            grad: must not change before the result is there.
            out: of the shape of ``source``, becomes the result where nothing is summed; None makes it.
        """
        if not self.disjoint:
            out = None
        elif out is None:
            out = grad.new_empty(self.shape(grad, self.source))
        return GradInFlight(self, self._post(grad, self.target, self.receives, self.sends, self.source, out), grad, out)

    def view(self, x: Tensor, origin: Box, box: Box) -> Tensor:
        """The part ``box`` of a tensor that covers ``origin``."""
        index = [slice(None)] * x.ndim
        for dim, (lo, hi), (base, _) in zip(self.dims, box, origin):
            index[dim] = slice(lo - base, hi - base)
        return x[tuple(index)]

    def shape(self, x: Tensor, box: Box) -> list[int]:
        """Of a tensor like ``x`` that covers ``box``."""
        sizes = list(x.shape)
        for dim, (lo, hi) in zip(self.dims, box):
            sizes[dim] = hi - lo
        return sizes

    def messages(self, boxes: dict[int, Box]) -> Iterator[tuple[int, Box]]:
        """The ranks that boxes are exchanged with, this one included, in their order on the axis."""
        me = self.axis.index
        return each_message(
            boxes.items(), lambda message: None if message[0] == me else tuple(hi - lo for lo, hi in message[1])
        )

    def _post(
        self, x: Tensor, origin: Box, sends: dict[int, Box], receives: dict[int, Box], target: Box, out: Tensor | None
    ) -> Exchange:
        """Messages of boxes of x, which covers ``origin``. Those received come straight to their position in ``out``,
        which covers ``target``, if that is contiguous there."""
        me = self.axis.index
        sent: dict[int, Tensor] = {}
        for p, box in self.messages(sends):
            if p != me:
                sent[p] = self.view(x, origin, box).contiguous()
                self.cp.ledger.sent(self.op, sent[p].nbytes)
        received: dict[int, Tensor] = {}
        for p, box in self.messages(receives):
            if p != me:
                part = None if out is None else self.view(out, target, box)
                fits = part is not None and part.is_contiguous()
                received[p] = part if fits else x.new_empty(self.shape(x, box))
        return Exchange(self.axis, self.op, self.cp.ledger, sent, received)


class InFlight:
    """A tensor on its way to the ranks that want its boxes.

    Attributes:
        out: the box that this rank wants, with its own part filled in; the others' come at any time until :meth:`wait`.
    """

    def __init__(self, plan: ExchangePlan, exchange: Exchange, out: Tensor) -> None:
        self._plan, self._exchange, self.out = plan, exchange, out

    def wait(self) -> Tensor:
        """Wait for the parts of the others, and return the box that this rank wants; it is not kept here."""
        plan, received = self._plan, self._exchange.wait()
        out, self.out = self.out, None
        for p, box in plan.messages(plan.receives):
            part = plan.view(out, plan.target, box)
            if p != plan.axis.index and not part.is_contiguous():
                part.copy_(received[p])
        return out


class GradInFlight:
    """The gradient of what ranks wanted, on its way to the ranks that have it."""

    def __init__(self, plan: ExchangePlan, exchange: Exchange, grad: Tensor, out: Tensor | None) -> None:
        self._plan, self._exchange, self._grad, self._out = plan, exchange, grad, out

    def wait(self) -> Tensor:
        """Wait, and return the gradient of the box that this rank has; it is not kept here."""
        plan, received, me = self._plan, self._exchange.wait(), self._plan.axis.index
        grad, out, self._grad, self._out = self._grad, self._out, None, None
        if me in plan.sends:
            received[me] = plan.view(grad, plan.target, plan.sends[me])
        if plan.disjoint:
            for p, box in plan.messages(plan.sends):
                part = plan.view(out, plan.source, box)
                if p == me or not part.is_contiguous():
                    part.copy_(received[p])
            return out
        # As many addends as ranks: in bf16 each of them would be rounded once more.
        acc_dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(plan.shape(grad, plan.source), dtype=acc_dtype)
        for p, box in plan.messages(plan.sends):
            plan.view(total, plan.source, box).add_(received[p])
        return total.to(grad.dtype)


@lru_cache(maxsize=4096)
def _boxes(me: int, has: Layout, wants: Layout) -> tuple[dict[int, Box], dict[int, Box], bool]:
    """Boxes that ``me`` sends to and receives from each rank, itself included, and whether those sent are disjoint and
    all that it has."""
    sends = {p: box for p, want in enumerate(wants) if (box := _intersection(has[me], want))}
    receives = {p: box for p, have in enumerate(has) if (box := _intersection(have, wants[me]))}
    boxes = list(sends.values())
    disjoint = sum(map(_volume, boxes)) == _volume(has[me]) and not any(
        _intersection(a, b) for i, a in enumerate(boxes) for b in boxes[:i]
    )
    return sends, receives, disjoint


def _intersection(a: Box, b: Box) -> Box | None:
    box = tuple((max(lo, lo2), min(hi, hi2)) for (lo, hi), (lo2, hi2) in zip(a, b))
    return box if all(lo < hi for lo, hi in box) else None


def _volume(box: Box) -> int:
    return prod(hi - lo for lo, hi in box)


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
