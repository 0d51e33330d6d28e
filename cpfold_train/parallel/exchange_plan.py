"""Who sends which box of a sharded tensor to whom, and tensors that are on their way; without autograd.

Every distributed op of the trunk is described by two layouts: which box of the global tensor each rank *has* and which
box it *wants*. Rank p sends rank q the intersection of what p has and what q wants, and nothing else. All-to-all,
all-gather of even or uneven pieces and the gathering of a band of tiles are all of this form, on square and on
rectangular grids alike. The way of gradients is the transpose: that of a box travels back to the rank that has it and
is summed.

A box is a tuple of half-open intervals, one for each of the ``dims`` that the layouts speak of.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from cpfold_train.dry_run import each_message
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.grid import Interval

Box = tuple[Interval, ...]
Layout = tuple[Box, ...]
"""The box of each rank of an axis, in the order of the axis."""


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
