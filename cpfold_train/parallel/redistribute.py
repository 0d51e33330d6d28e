"""Moving blocks of a sharded tensor between ranks, with gradients.

Every distributed op of the trunk is described by two layouts: which box of the global tensor each rank *has* and which
box it *wants*. Rank p sends rank q the intersection of what p has and what q wants, and nothing else. All-to-all,
all-gather of even or uneven pieces and the fetch of a band of tiles are all of this form, on square and on rectangular
grids alike. The backward is the transpose: the gradient of a box travels back to the rank that has it and is summed.

A box is a tuple of half-open intervals, one for each of the ``dims`` that the layouts speak of.
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
    """A redistribution in flight; :func:`finish` yields its result."""

    _out: Tensor
    _route: Route | None


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
    route = Route(cp, axis, dims, has, wants, op)
    return Pending(_Start.apply(x, route), route)


def finish(pending: Pending) -> Tensor:
    """Wait for a redistribution and return this rank's new box."""
    return pending._out if pending._route is None else _Finish.apply(pending._out, pending._route)


def finish_added(parts: Sequence[Pending], z: Tensor, row_factors: Tensor | None) -> Tensor:
    """``z + row_factors * update`` where the update comes in parts of dim 1, without joining or scaling it first.

    Args:
        parts: of the update (B, r, ..., c), in the order of their rows; none of them is used otherwise.
        z: (B, r, ..., c).
        row_factors: (B, r, 1, 1) or (B, 1, n, 1), or None for 1.

    Returns:
        (B, r, ..., c) in the dtype and with the strides of ``z``.
    """
    return _FinishAdded.apply(z, row_factors, [part._route for part in parts], *(part._out for part in parts))


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
    return x if axis.size == 1 else _SumToOwners.apply(x, Route(cp, axis, dims, owns, has, op))


def all_reduce(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Sum over the ranks of an axis; the result is the same on all of them.

    The gradient of a replicated value is a partial sum on each rank, so the backward is an all-reduce too.
    """
    return x if axis.size == 1 else _AllReduce.apply(x, cp, axis, op)


def all_reduce_max(x: Tensor, cp: ContextParallel, axis: Axis, op: str) -> Tensor:
    """Maximum over the ranks of an axis, without gradient."""
    return x.detach() if axis.size == 1 else _reduced(x, cp, axis, op, dist.ReduceOp.MAX)


class Route:
    """One redistribution and its transpose, without autograd: what :func:`start` and :func:`finish` consist of.

    Args:
        cp, axis, dims, has, wants, op: as for :func:`start`; negative dims are not taken.
    """

    def __init__(
        self, cp: ContextParallel, axis: Axis, dims: tuple[int, ...], has: Layout, wants: Layout, op: str
    ) -> None:
        self._cp, self._axis, self._dims, self._op = cp, axis, dims, op
        self._me = axis.index
        self._has, self._wants = has[self._me], wants[self._me]
        self._outgoing, self._incoming, self._disjoint = _plan(self._me, has, wants)
        self._exchange: Exchange | None = None
        self._back: Tensor | None = None

    def send_forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Post the messages; return the box that this rank wants with its own part filled in, and those of the others
        at any time until :meth:`wait_forward`. It is made, unless ``out`` is to become it."""
        out = x.new_empty(self._shape(x, self._wants)) if out is None else out
        self._post(x, self._has, self._outgoing, self._incoming, out)
        if self._me in self._outgoing:
            box = self._outgoing[self._me]
            self._view(out, self._wants, box).copy_(self._view(x, self._has, box))
        return out

    def wait_forward(self, out: Tensor) -> Tensor:
        """Wait, and fill in the parts of the others."""
        received = self._exchange.wait()
        for p, box in _in_turn(self._incoming, self._me):
            place = self._view(out, self._wants, box)
            if p != self._me and not place.is_contiguous():
                place.copy_(received[p])
        return out

    def send_grad(self, grad: Tensor, into: Tensor | None = None) -> None:
        """Post the gradient of the box that was wanted, on its way to the ranks that have it; ``into`` is to become
        what :meth:`wait_grad` returns."""
        if self._disjoint:
            self._back = grad.new_empty(self._shape(grad, self._has)) if into is None else into
        self._post(grad, self._wants, self._incoming, self._outgoing, self._back)

    def wait_grad(self, grad: Tensor) -> Tensor:
        """Wait, and return the gradient of the box that this rank has; ``grad`` is what :meth:`send_grad` was given."""
        received = self._exchange.wait()
        if self._me in self._outgoing:
            received[self._me] = self._view(grad, self._wants, self._outgoing[self._me])
        if self._disjoint:
            out, self._back = self._back, None
            for p, box in _in_turn(self._outgoing, self._me):
                place = self._view(out, self._has, box)
                if p == self._me or not place.is_contiguous():
                    place.copy_(received[p])
        else:
            # As many addends as ranks: in bf16 each of them would be rounded once more.
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros(self._shape(grad, self._has), dtype=wide)
            for p, box in _in_turn(self._outgoing, self._me):
                self._view(total, self._has, box).add_(received[p])
            out = total.to(grad.dtype)
        return out

    def _view(self, x: Tensor, origin: Box, box: Box) -> Tensor:
        """The part ``box`` of a tensor that covers ``origin``."""
        index = [slice(None)] * x.ndim
        for dim, (lo, hi), (base, _) in zip(self._dims, box, origin):
            index[dim] = slice(lo - base, hi - base)
        return x[tuple(index)]

    def _shape(self, x: Tensor, box: Box) -> list[int]:
        sizes = list(x.shape)
        for dim, (lo, hi) in zip(self._dims, box):
            sizes[dim] = hi - lo
        return sizes

    def _post(
        self, x: Tensor, origin: Box, outgoing: dict[int, Box], incoming: dict[int, Box], out: Tensor | None
    ) -> None:
        """Messages from ``outgoing`` boxes of x, which covers ``origin``. Those received come straight to where they
        belong in ``out`` if that is contiguous there."""
        sends: dict[int, Tensor] = {}
        for p, box in _in_turn(outgoing, self._me):
            if p != self._me:
                sends[p] = self._view(x, origin, box).contiguous()
                self._cp.ledger.sent(self._op, sends[p].nbytes)
        receives: dict[int, Tensor] = {}
        target = self._wants if incoming is self._incoming else self._has
        for p, box in _in_turn(incoming, self._me):
            if p != self._me:
                place = None if out is None else self._view(out, target, box)
                fits = place is not None and place.is_contiguous()
                receives[p] = place if fits else x.new_empty(self._shape(x, box))
        self._exchange = Exchange(self._axis, self._op, self._cp.ledger, sends, receives)


def _in_turn(boxes: dict[int, Box], me: int) -> Iterator[tuple[int, Box]]:
    """The ranks that ``me`` exchanges boxes with, itself included, in their order on the axis."""
    return each_message(
        boxes.items(), lambda message: None if message[0] == me else tuple(hi - lo for lo, hi in message[1])
    )


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
    def forward(ctx, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.send_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.route.wait_grad(grad), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, route: Route) -> Tensor:
        ctx.route = route
        ctx.mark_dirty(out)
        return route.wait_forward(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.route.send_grad(grad)
        return grad, None


class _FinishAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, factors: Tensor | None, routes: list[Route | None], *outs: Tensor) -> Tensor:
        ctx.factors, ctx.routes, ctx.dtypes = factors, routes, [out.dtype for out in outs]
        ctx.sizes = [out.shape[1] for out in outs]
        new = torch.empty_like(z)
        for route, out, rows in zip(routes, outs, _slices(ctx.sizes)):
            update = out if route is None else route.wait_forward(out)
            if factors is None:
                torch.add(z[:, rows], update, out=new[:, rows])
            else:
                torch.addcmul(z[:, rows], update, _of_rows(factors, rows), out=new[:, rows])
        return new

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = []
        for route, dtype, rows in zip(ctx.routes, ctx.dtypes, _slices(ctx.sizes)):
            part = grad[:, rows]
            # Contiguous whatever the strides of z: messages are made of it.
            back.append(part.new_empty(part.shape, dtype=dtype))
            if ctx.factors is None:
                back[-1].copy_(part)
            else:
                torch.mul(part, _of_rows(ctx.factors, rows), out=back[-1])
            if route is not None:
                route.send_grad(back[-1])
        return grad, None, None, *back


def _slices(sizes: list[int]) -> Iterator[slice]:
    ends = list(accumulate(sizes, initial=0))
    return map(slice, ends, ends[1:])


def _of_rows(factors: Tensor, rows: slice) -> Tensor:
    return factors if factors.shape[1] == 1 else factors[:, rows]


class _SumToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        route.send_grad(x)
        return route.wait_grad(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.route.wait_forward(ctx.route.send_forward(grad)), None


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
