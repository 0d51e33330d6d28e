"""What is done otherwise where tensors have no contents.

A tile is computed some rows at a time, which on 3,072 tokens is thousands of blocks. Without contents they are all the
same, so two of them show what memory is held, and stand for the work of all. One message stands for all that a rank
exchanges of one shape at a time, and takes its time. And what goes to the host does so in name only.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.kernels import attention, by_rows, partial_attention
from cpfold_train.losses import smooth_lddt
from cpfold_train.model import confidence_scores
from cpfold_train.ops import offload, ring_attention, window_attention
from cpfold_train.parallel import redistribute
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.redistribute import Box
from cpfold_train.parallel.sharding import SharedParameter
from cpfold_train.simulate.batch import CHAINS
from cpfold_train.simulate.trace import ELSEWHERE, Tracer
from cpfold_train.simulate.work_counter import Kernel

CUEQUIVARIANCE = "cuequivariance_torch"
Blocks = Callable[..., Iterator[Any]]


@contextmanager
def two_blocks_for_all(tracer: Tracer) -> Iterator[None]:
    """Inside, loops over blocks run twice, and the tracer counts the second time for all that are left out."""

    def shortened(blocks: Blocks) -> Blocks:
        def some(*args: Any) -> Iterator[Any]:
            first, *others = blocks(*args)
            yield first
            if others:
                with tracer.times(sum(map(_size, others)) / _size(others[0])):
                    yield others[0]

        return some

    def near_pairs(truth: Tensor, first: int, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        found = _near_pairs(truth, first, step)
        pairs = next(found)
        yield pairs
        # Without coordinates every row has equally many neighbours.
        rows = len(pairs[0]) // min(smooth_lddt.NEIGHBOURS, len(truth))
        if (left := len(range(first, len(truth), step)) - rows) > 0:
            with tracer.times(left / min(left, rows)):
                yield next(found)

    _near_pairs, scores = smooth_lddt._near_pairs, shortened(attention.score_blocks)
    with ExitStack() as stack:
        for module, name, function in (
            (by_rows, "_blocks", shortened(by_rows._blocks)),
            (window_attention, "_blocks", shortened(window_attention._blocks)),
            (smooth_lddt, "_near_pairs", near_pairs),
            *((module, "score_blocks", scores) for module in (attention, partial_attention, ring_attention)),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield


@contextmanager
def one_message_for_all_alike(tracer: Tracer) -> Iterator[None]:
    """Inside, of the messages of an exchange only one of each shape is made, and the tracer counts it for all."""

    def one_of_a_kind(boxes: dict[int, Box], me: int) -> Iterator[tuple[int, Box]]:
        kinds: defaultdict[tuple[int, ...] | None, list[tuple[int, Box]]] = defaultdict(list)
        for p, box in boxes.items():
            kinds[None if p == me else tuple(hi - lo for lo, hi in box)].append((p, box))
        for alike in kinds.values():
            with tracer.copies(len(alike)):
                yield alike[0]

    with mock.patch.object(redistribute, "_in_turn", one_of_a_kind):
        yield


def _size(block: slice | tuple[slice, ...]) -> int:
    """How much of all a block is. Of windows there are three slices, but their atoms and keys follow from the first."""
    slices = block if isinstance(block, tuple) else (block,)
    size = 1
    for part in slices if len(slices) < 3 else slices[:1]:
        size *= 1 if part.stop is None else part.stop - part.start
    return size


@contextmanager
def host_is_elsewhere(tracer: Tracer) -> Iterator[None]:
    """Inside, what is kept on the host is not counted: it is for plans of GPUs."""

    class Kept(offload._Kept):
        def __init__(self, *args: Any) -> None:
            with tracer.category(ELSEWHERE), tracer.over_host_link():
                super().__init__(*args)

        def prefetch(self) -> None:
            with tracer.over_host_link():
                super().prefetch()

    with mock.patch.object(offload, "_Kept", Kept):
        yield


@contextmanager
def messages_take_time(tracer: Tracer) -> Iterator[None]:
    """Inside, the tracer sees which messages are waited for, and when: torch's fake group has them at once."""

    class Timed(Exchange):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            # What it sends has just been counted, and nothing of others since.
            self._arrival = tracer.arrival()

        def wait(self) -> dict[int, Tensor]:
            tracer.wait(self._arrival)
            return super().wait()

    def reduced(*args: Any) -> Tensor:
        out = reduce(*args)
        tracer.wait(tracer.arrival())
        return out

    reduce = redistribute._reduced
    with mock.patch.object(redistribute, "Exchange", Timed), mock.patch.object(redistribute, "_reduced", reduced):
        yield


@contextmanager
def weights_come_and_go(tracer: Tracer) -> Iterator[None]:
    """Inside, the tracer sees when FSDP makes room for a block's weights and when it frees them: it resizes storages,
    which is no operation of torch's."""

    resize, make_room = torch.UntypedStorage.resize_, SharedParameter.init_all_gather_outputs

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        tracer.resized(storage)
        return storage

    def gathered(*args: Any) -> None:
        with tracer.category("gathered"):
            make_room(*args)

    with (
        mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell),
        mock.patch.object(SharedParameter, "init_all_gather_outputs", gathered),
    ):
        yield


@contextmanager
def fused_attention(tracer: Tracer) -> Iterator[None]:
    """Inside, a kernel that holds no scores stands in the place of cuEquivariance's, which need not be installed.

    It reads its arguments and writes its results once, and keeps a number a query for the backward pass, which makes
    five products of the size of the forward pass's two (Dao et al., "FlashAttention", NeurIPS 2022).
    """

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, bias, out, sums)
            count(2, q, k, [q, k, v, bias, out, sums])
            return out

        @staticmethod
        def backward(ctx, grad: Tensor):
            q, k, v, bias, *_ = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in (q, k, v, bias)]
            count(5, q, k, [*ctx.saved_tensors, grad, *grads])
            return tuple(grads)

    def count(products: int, q: Tensor, k: Tensor, moved: list[Tensor]) -> None:
        """Queries times keys so many times, and the exponential of each score."""
        scores = q[..., 0].numel() * k.shape[-2]
        moved_bytes = sum(x.nbytes for x in moved)
        tracer.kernel(Kernel(products * 2 * scores * q.shape[-1], q.dtype, moved_bytes, scores))

    def triangle_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        return Fused.apply(q, k, v, bias[:, 0])

    before = sys.modules.get(CUEQUIVARIANCE)
    sys.modules[CUEQUIVARIANCE] = SimpleNamespace(triangle_attention=triangle_attention)
    try:
        yield
    finally:
        del sys.modules[CUEQUIVARIANCE]
        if before is not None:
            sys.modules[CUEQUIVARIANCE] = before


class _Contents(TorchDispatchMode):
    """Numbers that are read from tensors without contents: a float is the sum of a mask of all tokens, and a whole
    number the last chain. A mask that picks rows picks all."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(self._tokens) if args[0].is_floating_point() else CHAINS - 1
        if func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            return args[0].clone()
        return func(*args, **(kwargs or {}))


@contextmanager
def contents_assumed(tokens: int) -> Iterator[None]:
    """Inside, what is read from tensors is that of the largest sample, proteins without ligands."""

    def frames_of_polymers(x_pred: Tensor, center: Tensor, feats: dict[str, Any], cp: ContextParallel) -> Tensor:
        return frame_points(x_pred, center, feats | {"mol_type": ()}, cp)

    frame_points = confidence_scores.frame_points
    with _Contents(tokens), mock.patch.object(confidence_scores, "frame_points", frames_of_polymers):
        yield
