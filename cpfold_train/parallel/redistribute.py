"""Moving blocks of a sharded tensor between ranks, with gradients.

Every distributed op of the trunk is described by two layouts: which box of the global tensor each rank *has* and which
box it *wants*. Rank p sends rank q the intersection of what p has and what q wants, and nothing else. All-to-all,
all-gather of even or uneven pieces and the fetch of a band of tiles are all of this form, on square and on rectangular
grids alike. The backward is the transpose: the gradient of a box travels back to the rank that has it and is summed.

A box is a tuple of half-open intervals, one for each of the ``dims`` that the layouts speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.grid import Interval

Box = tuple[Interval, ...]
Layout = tuple[Box, ...]
"""The box of each rank of an axis, in the order of the axis."""


@dataclass(frozen=True)
class Pending:
    """A redistribution in flight; :func:`finish` yields its result."""

    _out: Tensor
    _route: _Route | None


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
        dims: the dims of ``x`` that the boxes describe; the others are whole on every rank.
        has: the box of each rank before. Boxes may be equal on several ranks only if a rank wants none of the others'.
        wants: the box of each rank after. They may overlap; every index must be had by exactly one rank of the axis.
        op: name for the ledger and for errors.

    Returns:
        Handle for :func:`finish`, whose result has the shape of ``wants[axis.index]`` in ``dims``.
    """
    if axis.size == 1:
        return Pending(x, None)
    route = _Route(cp, axis, tuple(d % x.ndim for d in dims), has, wants, op)
    return Pending(_Start.apply(x, route), route)


def finish(pending: Pending) -> Tensor:
    """Wait for a redistribution and return this rank's new box."""
    return pending._out if pending._route is None else _Finish.apply(pending._out, pending._route)


def all_reduce(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Sum over the ranks of an axis; the result is the same on all of them.

    The gradient of a replicated value is a partial sum on each rank, so the backward is an all-reduce too.
    """
    return x if axis.size == 1 else _AllReduce.apply(x, cp, axis, op)


def all_reduce_max(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Maximum over the ranks of an axis, without gradient."""
    return x.detach() if axis.size == 1 else _reduced(x, cp, axis, op, dist.ReduceOp.MAX)


class _Route:
    """What one redistribution moves: fixed by its layouts, with the exchange that is under way."""

    def __init__(
        self, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, wants: Layout, op: str
    ) -> None:
        self.cp, self.axis, self.dims, self.op = cp, axis, dims, op
        self.has, self.wants = has, wants
        self.me = axis.index
        self.outgoing, self.incoming, self.disjoint = _plan(self.me, has, wants)
        self.exchange: Exchange | None = None

    def view(self, x: Tensor, origin: Box, box: Box) -> Tensor:
        """The part ``box`` of a tensor that covers ``origin``."""
        index = [slice(None)] * x.ndim
        for dim, (lo, hi), (base, _) in zip(self.dims, box, origin):
            index[dim] = slice(lo - base, hi - base)
        return x[tuple(index)]

    def shape(self, x: Tensor, box: Box) -> list[int]:
        sizes = list(x.shape)
        for dim, (lo, hi) in zip(self.dims, box):
            sizes[dim] = hi - lo
        return sizes

    def post(self, x: Tensor, origin: Box, outgoing: dict[int, Box], incoming: dict[int, Box]) -> None:
        sends = {p: self.view(x, origin, box).contiguous() for p, box in outgoing.items() if p != self.me}
        receives = {p: x.new_empty(self.shape(x, box)) for p, box in incoming.items() if p != self.me}
        self.exchange = Exchange(self.axis, self.op, self.cp.ledger, sends, receives)

    def wait(self) -> dict[int, Tensor]:
        received = self.exchange.wait()
        self.exchange = None
        return received


@lru_cache(maxsize=4096)
def _plan(me: int, has: Layout, wants: Layout) -> tuple[dict[int, Box], dict[int, Box], bool]:
    """Boxes that ``me`` sends to and receives from each rank, itself included, and whether those sent are disjoint."""
    outgoing = {p: box for p, want in enumerate(wants) if (box := _intersection(has[me], want))}
    incoming = {p: box for p, have in enumerate(has) if (box := _intersection(have, wants[me]))}
    boxes = list(outgoing.values())
    disjoint = sum(map(_volume, boxes)) == _volume(has[me]) and not any(
        _intersection(a, b) for i, a in enumerate(boxes) for b in boxes[:i]
    )
    return outgoing, incoming, disjoint


def _intersection(a: Box, b: Box) -> Box | None:
    box = tuple((max(lo, lo2), min(hi, hi2)) for (lo, hi), (lo2, hi2) in zip(a, b))
    return box if all(lo < hi for lo, hi in box) else None


def _volume(box: Box) -> int:
    return prod(hi - lo for lo, hi in box)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        ctx.shape = x.shape
        mine, want = route.has[route.me], route.wants[route.me]
        route.post(x, mine, route.outgoing, route.incoming)
        out = x.new_empty(route.shape(x, want))
        if route.me in route.outgoing:
            box = route.outgoing[route.me]
            route.view(out, want, box).copy_(route.view(x, mine, box))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        mine, want = route.has[route.me], route.wants[route.me]
        received = route.wait()
        if route.me in route.outgoing:
            received[route.me] = route.view(grad, want, route.outgoing[route.me])
        if route.disjoint:
            out = grad.new_empty(ctx.shape)
            for p, piece in received.items():
                route.view(out, mine, route.outgoing[p]).copy_(piece)
        else:
            out = grad.new_zeros(ctx.shape)
            for p in sorted(received):
                route.view(out, mine, route.outgoing[p]).add_(received[p])
        return out, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        want = route.wants[route.me]
        for p, piece in route.wait().items():
            route.view(out, want, route.incoming[p]).copy_(piece)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        route.post(grad, route.wants[route.me], route.incoming, route.outgoing)
        return grad, None


def _reduced(x: Tensor, cp: ContextParallel, axis: Axis, op: str, reduce_op: dist.ReduceOp) -> Tensor:
    out = x.detach().contiguous().clone()
    # A ring all-reduce sends each element 2 (n - 1) / n times.
    cp.ledger.sent(op, 2 * (axis.size - 1) * out.numel() * out.element_size() // axis.size, 2 * (axis.size - 1))
    with cp.ledger.waiting(op, out.device):
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
