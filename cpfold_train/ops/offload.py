"""What lies between recomputed parts, kept in the memory of the host until the backward pass comes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cpfold_train.dry_run import from_host, to_host

PIECE_BYTES = 1 << 25
"""What lies on the host in one piece. Torch rounds pinned memory up to a power of two (pytorch#150517): in one piece, a
tile of 1,152 MiB would take 2 GiB. To tell it not to, by ``pinned_max_round_threshold_mb``, would be worse: up to torch
2.13 it then hands out blocks that are too small (pytorch#192722)."""


class Boundary:
    """What is kept of one boundary between blocks.

    Args:
        before: the boundary before it, if any.
    """

    def __init__(self, before: Boundary | None) -> None:
        self.before = before
        self.kept: list[_Kept] = []

    def hold(self, x: Tensor) -> _Kept:
        """Send a tensor to the host, to come back with what else is kept of this boundary."""
        with to_host():
            self.kept.append(_Kept(x, self.before))
        return self.kept[-1]

    def prefetch(self) -> None:
        """Start the way back of all of it."""
        for kept in self.kept:
            kept.prefetch()


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
        return boundary.hold(x) if x.dim() == 4 else x

    def bring_back(kept: Tensor | _Kept) -> Tensor:
        return kept.take() if isinstance(kept, _Kept) else kept

    with saved_tensors_hooks(keep, bring_back):
        yield boundary


class _Kept:
    """One tensor on the host, which knows the boundary before its own."""

    def __init__(self, x: Tensor, before: Boundary | None) -> None:
        self._device, self._before = x.device, before
        # In the order of its memory, so that nobody copies it to bring it into another.
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        x = x.permute(order)
        self._shape, self._back = x.shape, [order.index(dim) for dim in range(x.dim())]
        self._coming: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        x = x.reshape(-1)
        pieces = x.split(max(1, PIECE_BYTES // x.element_size()))
        with _beside(x.device, waits=True):
            self._host = [torch.empty_like(piece, device="cpu", pin_memory=x.is_cuda) for piece in pieces]
            for piece, there in zip(pieces, self._host):
                there.copy_(piece, non_blocking=True)
        if x.is_cuda:
            # Its memory must not be given to others before it has been read.
            x.record_stream(_stream(x.device))

    def prefetch(self) -> None:
        """Start the way back, if it has not been started."""
        if self._coming is None:
            with from_host(), _beside(self._device, waits=False):
                flat = self._host[0].new_empty(self._shape.numel(), device=self._device)
                for piece, there in zip(flat.split([len(there) for there in self._host]), self._host):
                    piece.copy_(there, non_blocking=True)
                self._coming = flat.view(self._shape).permute(self._back)
            if self._coming.is_cuda:
                # Copies that start after it need not be waited for.
                self._arrived = _stream(self._device).record_event()

    def take(self) -> Tensor:
        """The tensor on its device, and those of the boundary before it started on their way."""
        self.prefetch()
        x, self._coming = self._coming, None
        if x.is_cuda:
            torch.cuda.current_stream(x.device).wait_event(self._arrived)
            x.record_stream(torch.cuda.current_stream(x.device))
        if self._before is not None:
            self._before.prefetch()
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
