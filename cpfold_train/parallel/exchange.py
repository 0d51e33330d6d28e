"""The asynchronous exchange: post sends and receives, do other work, wait."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cpfold_train.parallel.context import Axis
from cpfold_train.parallel.ledger import Ledger


class Exchange:
    """One set of messages in flight between this rank and others of an axis.

    All ranks of the axis must post matching exchanges in the same order. A rank never sends to itself.

    Args:
        axis: the ranks.
        op: the operation's name, for the ledger and for errors.
        ledger: where waiting is booked; what is sent is booked by whoever makes the messages.
        sends: contiguous tensors by peer index on the axis; they must not change before :meth:`wait` returns.
        receives: contiguous buffers by peer index; they are filled when :meth:`wait` returns.

    Raises:
        RuntimeError: from :meth:`wait`, naming the op, the ranks and the shapes, when a peer fails or times out.
    """

    def __init__(
        self, axis: Axis, op: str, ledger: Ledger, sends: dict[int, Tensor], receives: dict[int, Tensor]
    ) -> None:
        self._axis, self._op, self._ledger = axis, op, ledger
        self._sends, self._receives = sends, receives
        messages = [dist.P2POp(dist.irecv, t, axis.ranks[p], axis.group) for p, t in receives.items()]
        messages += [dist.P2POp(dist.isend, t, axis.ranks[p], axis.group) for p, t in sends.items()]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> dict[int, Tensor]:
        """Return the receive buffers, filled. The sent tensors may change from now on."""
        buffers = self._receives or self._sends
        if self._works:
            device = next(iter(buffers.values())).device
            with self._ledger.waiting(self._op, device):
                try:
                    for work in self._works:
                        work.wait()
                except RuntimeError as error:
                    if "DataLoader worker" in str(error):
                        # torch's handler of SIGCHLD raises it wherever this rank is at the moment.
                        raise
                    raise RuntimeError(self._describe()) from error
        received = self._receives
        # Whoever keeps the exchange does not keep what it moved.
        self._works, self._sends, self._receives = [], {}, {}
        return received

    def _describe(self) -> str:
        def side(tensors: dict[int, Tensor]) -> str:
            return ", ".join(f"rank {self._axis.ranks[p]} {tuple(t.shape)}" for p, t in tensors.items()) or "nobody"

        return (
            f"{self._op}: the exchange on axis {self._axis.name} failed on rank {self._axis.ranks[self._axis.index]}, "
            f"which sends to {side(self._sends)} and receives from {side(self._receives)}"
        )
