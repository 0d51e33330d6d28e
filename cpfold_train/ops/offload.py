"""What lies between recomputed parts, kept in the memory of the host until the backward pass comes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Boundary:
    """What is kept of one boundary between blocks.

    Args:
        before: the boundary before it, if any.
    """

    def __init__(self, before: Boundary | None) -> None:
        self.before = before
        self.kept: list[_Kept] = []

    def fetch(self) -> None:
        """Start the way back of all of it."""
        for kept in self.kept:
            kept.fetch()


@contextmanager
def kept_on_host(before: Boundary | None) -> Iterator[Boundary]:
    """Within it, tiles and MSA blocks (B, ., ., c) that are saved for the backward pass go to the host.

    There they come back one boundary ahead: while the backward pass works on a block, what the one before it needs is
    under way. On a GPU both ways run beside the computation, on a stream of their own, from and to pinned memory. On
    CPU the host is where they are already, and it costs a copy of each.

    To be wrapped around a call of :func:`~cpfold_train.ops.recompute.recompute`, which saves its arguments; what is
    saved inside of it is not touched.

    Args:
        before: what this gave for the block before; None for the first.
    """
    boundary = Boundary(before)

    def keep(x: Tensor) -> Tensor | _Kept:
        if x.dim() != 4:
            return x
        boundary.kept.append(_Kept(x, before))
        return boundary.kept[-1]

    def bring_back(kept: Tensor | _Kept) -> Tensor:
        return kept.take() if isinstance(kept, _Kept) else kept

    with saved_tensors_hooks(keep, bring_back):
        yield boundary


class _Kept:
    """One tensor on the host, which knows the boundary before its own."""

    def __init__(self, x: Tensor, before: Boundary | None) -> None:
        self._device, self._before = x.device, before
        self._coming: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        with _beside(x.device, waits=True):
            self._host.copy_(x, non_blocking=True)
        if x.is_cuda:
            # Its memory must not be given to others before it has been read.
            x.record_stream(_stream(x.device))

    def fetch(self) -> None:
        """Start the way back, if it has not been started."""
        if self._coming is None:
            with _beside(self._device, waits=False):
                self._coming = self._host.to(self._device, non_blocking=True, copy=True)
            if self._coming.is_cuda:
                # What is fetched after it need not be waited for.
                self._arrived = _stream(self._device).record_event()

    def take(self) -> Tensor:
        """The tensor on its device, and those of the boundary before it started on their way."""
        self.fetch()
        x, self._coming = self._coming, None
        if x.is_cuda:
            torch.cuda.current_stream(x.device).wait_event(self._arrived)
            x.record_stream(torch.cuda.current_stream(x.device))
        if self._before is not None:
            self._before.fetch()
        return x


def _beside(device: torch.device, waits: bool) -> torch.cuda.StreamContext | nullcontext:
    """A region whose copies run beside the computation, after what has been computed so far if it ``waits``."""
    if device.type != "cuda":
        return nullcontext()
    stream = _stream(device)
    if waits:
        stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
