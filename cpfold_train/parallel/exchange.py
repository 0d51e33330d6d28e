"""The asynchronous exchange: post sends and receives, do other work, wait."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cpfold_train.parallel.context import Axis
from cpfold_train.parallel.ledger import Ledger


class Exchange:
    """One set of messages in flight between this rank and others of an axis.

    All messages, of whatever axis, go through the process group of the world: each of NCCL's has buffers of its own on
    the device. There and in gloo's, the n-th message from rank p to rank q arrives as the n-th that q receives from p,
    so p and q must agree on their order. They do, because

    - all ranks of a replica post the same exchanges, of all axes, in the same order: forward it is that of the program,
      and backward that of the graph, which the same program has made on each of them;
    - an exchange has at most one message from p to q, which is in it on both ends or on neither: both have found it
      from the same two layouts (:mod:`cpfold_train.parallel.exchange_plan`), in which an empty box makes no message.

    So the messages from p to q are, on both ends, those of the same exchanges in the same order. Ranks that have
    nothing to send or receive in an exchange post nothing, and nobody waits for them. What DDP or FSDP do in the same
    group comes at the same points between them, for the same reason: NCCL does one thing of a group after the other.

    **Streams.** NCCL sends and receives on a stream of its own. It starts when the stream of computation has come to
    the point where the exchange was posted, at which the sent tensors are written; and ``work.wait()`` lets the stream
    of computation go no further before NCCL's has filled the receive buffers and read the sent tensors, while the host
    runs on. What the exchange holds until :meth:`wait` cannot be given to others by the allocator while NCCL's stream
    is at it, and once it is let go, what gets the memory is computed on the stream that has waited. Nothing has to be
    recorded on NCCL's stream (``Tensor.record_stream``) for that. Tensors must have been made on the stream that posts
    and waits.

    Args:
        axis: the ranks.
        op: the operation's name, for the ledger and for errors.
        ledger: where waiting is booked; what is sent is booked where messages are made.
        sends: contiguous tensors by peer index on the axis; they must not change before :meth:`wait` returns.
        receives: contiguous buffers by peer index; they are filled when :meth:`wait` returns, on CUDA for whatever is
            computed on the current stream from then on.

    Raises:
        RuntimeError: from :meth:`wait`, naming the op, the ranks and the shapes, when a peer fails or times out. Not on
            NCCL, where the watch notices it (:mod:`cpfold_train.parallel.watch`).
    """

    def __init__(
        self, axis: Axis, op: str, ledger: Ledger, sends: dict[int, Tensor], receives: dict[int, Tensor]
    ) -> None:
        self._axis, self._op, self._ledger = axis, op, ledger
        self._sends, self._receives = sends, receives
        messages = [dist.P2POp(dist.irecv, t, axis.ranks[p]) for p, t in receives.items()]
        messages += [dist.P2POp(dist.isend, t, axis.ranks[p]) for p, t in sends.items()]
        self._works = dist.batch_isend_irecv(messages) if messages else []
        self._arrival = ledger.arrival()

    def wait(self) -> dict[int, Tensor]:
        """Return the receive buffers, filled. The sent tensors may change from now on."""
        # An exchange without messages counts too: so all ranks of a replica come to the same numbers.
        device = next((t.device for t in (self._receives | self._sends).values()), torch.device("cpu"))
        with self._ledger.waiting(self._op, device, self._arrival):
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
