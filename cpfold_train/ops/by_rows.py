"""Local parts of the network computed a few rows at a time, forward and backward.

What happens to a pair inside a norm, a projection, a gate or a transition concerns no other pair. Computed for a whole
tile, each such step reads and writes memory the size of a tile or of several; computed for a block of rows, the
intermediates stay in cache and are never kept: the backward pass computes a block again from its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 22
"""Size of the widest intermediate of a block on CPU: small enough for the last-level cache, large enough for a fast
matmul."""
GPU_BLOCK_BYTES = 1 << 28
"""The same on a GPU, where a block must be worth its kernel launches."""


def rows_per_block(bytes_per_row: int, device: torch.device, cpu_bytes: int = BLOCK_BYTES) -> int:
    """How many rows to take at a time, so that intermediates of ``bytes_per_row`` fill one block."""
    return max(1, (cpu_bytes if device.type == "cpu" else GPU_BLOCK_BYTES) // max(1, bytes_per_row))


def by_rows(
    function: Callable[..., Tensor],
    rows: int,
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    dim: int = 1,
) -> Tensor:
    """``function(*inputs, *shared)`` for ``rows`` rows of the inputs at a time.

    Args:
        function: differentiable; treats the rows independently. Everything that needs a gradient must be an argument.
        rows: how many at a time; the last block may be smaller.
        inputs: tensors whose dim 1 is the rows, (B, r, ...) with equal r.
        shared: tensors that every row needs whole, such as weights.
        dim: where the rows are in the function's result.

    Returns:
        The results, joined along ``dim``.
    """
    return _ByRows.apply(function, rows, dim, len(inputs), *inputs, *shared)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows: int, dim: int, count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.rows, ctx.dim, ctx.count = function, rows, dim, count
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        inputs, shared = tensors[:count], tensors[count:]
        total = inputs[0].shape[1]
        out = None
        for start in range(0, total, rows):
            stop = min(start + rows, total)
            part = function(*(x[:, start:stop] for x in inputs), *shared)
            if out is None:
                shape = list(part.shape)
                shape[dim] = total
                out = part.new_empty(shape)
            out.narrow(dim, start, stop - start).copy_(part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[4:]) if needs]
        grads: list[Tensor | None] = [None] * len(tensors)
        for i in needed:
            x = tensors[i]
            # A sum over many blocks in bf16 would stop growing after a few hundred of them.
            wide = torch.promote_types(x.dtype, torch.float32)
            grads[i] = torch.empty_like(x) if i < ctx.count else torch.zeros_like(x, dtype=wide)
        total = tensors[0].shape[1]
        device, dtype, enabled = ctx.autocast
        for start in range(0, total, ctx.rows):
            stop = min(start + ctx.rows, total)
            block = [x[:, start:stop] if i < ctx.count else x for i, x in enumerate(tensors)]
            for i in needed:
                block[i] = block[i].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                part = ctx.function(*block)
            part_grad = grad.narrow(ctx.dim, start, stop - start)
            for i, g in zip(needed, torch.autograd.grad(part, [block[i] for i in needed], part_grad)):
                if i < ctx.count:
                    grads[i][:, start:stop] = g
                else:
                    grads[i] += g
        cast = (g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors))
        return None, None, None, None, *cast
