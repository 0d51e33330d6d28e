"""A stand-in for cuEquivariance's attention, whose package need not be installed to plan with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from cpfold_train.kernels.choice import PACKAGES
from cpfold_train.simulate.trace import Tracer
from cpfold_train.simulate.work_counter import Kernel


@contextmanager
def cuequivariance_counted(tracer: Tracer) -> Iterator[None]:
    """Inside, a kernel that holds no scores is imported in the position of cuEquivariance's.

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

    package = PACKAGES["cuequivariance"]
    before = sys.modules.get(package)
    sys.modules[package] = SimpleNamespace(triangle_attention=triangle_attention)
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before
