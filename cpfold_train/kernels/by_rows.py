"""Local parts of the network computed a few rows at a time, forward and backward.

What happens to a pair inside a norm, a projection, a gate or a transition concerns no other pair. Computed for a whole
tile, each such step reads and writes memory the size of a tile or of several; computed for a block of rows, the
intermediates stay in cache and are never kept: the backward pass computes a block again from its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from cpfold_train.dry_run import each_block

BLOCK_BYTES = 1 << 22
"""Size of the widest intermediate of a block on CPU: small enough for the last-level cache, large enough for a fast
matmul."""
GPU_BLOCK_BYTES = 1 << 28
"""The same on a GPU, where a block must be worth its kernel launches."""
_chosen_bytes: int | None = None
_as_on_gpu = False

AutocastState = tuple[str, torch.dtype, bool]
Arguments = Sequence[Tensor | tuple[Tensor, ...]]
"""Tensors, and named tuples of tensors."""


def set_block_bytes(block_bytes: int | None, as_on_gpu: bool = False) -> None:
    """Choose the size of a block for this process, like the number of its threads.

    Args:
        block_bytes: None is the device's own.
        as_on_gpu: tensors are on the CPU in name only, as in a plan: blocks are those of a GPU.
    """
    global _chosen_bytes, _as_on_gpu
    _chosen_bytes, _as_on_gpu = block_bytes, as_on_gpu


def rows_per_block(
    bytes_per_row: int, device: torch.device, cpu_bytes: int = BLOCK_BYTES, gpu_bytes: int = GPU_BLOCK_BYTES
) -> int:
    """How many rows to take at a time, so that intermediates of ``bytes_per_row`` fill one block."""
    on_gpu = _as_on_gpu or device.type != "cpu"
    block_bytes = _chosen_bytes or (gpu_bytes if on_gpu else cpu_bytes)
    return max(1, block_bytes // max(1, bytes_per_row))


def by_rows(
    function: Callable[..., Tensor],
    rows: int,
    inputs: Arguments,
    shared: Arguments,
    dim: int = 1,
) -> Tensor:
    """``function(*inputs, *shared)`` for ``rows`` rows of the inputs at a time.

    Args:
        function: differentiable; treats the rows independently. Everything that needs a gradient must be an argument.
        rows: how many at a time; the last block may be smaller.
        inputs: tensors whose dim 1 is the rows, (B, r, ...) with equal r, and named tuples of such tensors.
        shared: what every row needs whole, such as weights: tensors and named tuples of tensors.
        dim: where the rows are in the function's result.

    Returns:
        The results, joined along ``dim``.
    """
    one_by_one, tensors = _of_tensors(function, (*inputs, *shared)), _tensors(inputs)
    return _ByRows.apply(one_by_one, rows, dim, len(tensors), *tensors, *_tensors(shared))


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows: int, dim: int, count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.rows, ctx.dim, ctx.count = function, rows, dim, count
        ctx.save_for_backward(*tensors)
        ctx.autocast = autocast_state(tensors[0].device)
        return in_blocks(function, rows, tensors[:count], tensors[count:], dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[4:]) if needs]
        grads: list[Tensor | None] = [None] * len(tensors)
        once = _at_once(tensors[: ctx.count], ctx.rows)
        if not once:
            for i in needed:
                x = tensors[i]
                # A sum over many blocks in bf16 would stop growing after a few hundred of them.
                acc_dtype = torch.promote_types(x.dtype, torch.float32)
                grads[i] = torch.empty_like(x) if i < ctx.count else torch.zeros_like(x, dtype=acc_dtype)
        inputs, shared = tensors[: ctx.count], tensors[ctx.count :]
        for block, found in block_gradients(
            ctx.function, ctx.rows, inputs, shared, needed, grad, ctx.autocast, ctx.dim
        ):
            while found:
                i, g = found.popitem()
                if once:
                    grads[i] = g
                elif i < ctx.count:
                    grads[i][:, block] = g
                else:
                    grads[i] += g
        cast = (g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors))
        return None, None, None, None, *cast


def in_blocks(function: Callable[..., Tensor], rows: int, inputs: Arguments, shared: Arguments, dim: int = 1) -> Tensor:
    """What :func:`by_rows` returns, without gradient; all at once if there are no inputs."""
    function, inputs, shared = _of_tensors(function, (*inputs, *shared)), _tensors(inputs), _tensors(shared)
    if _at_once(inputs, rows):
        return function(*inputs, *shared).contiguous()
    out = None
    for block in _blocks(inputs, rows):
        part = function(*(x[:, block] for x in inputs), *shared)
        if out is None:
            shape = list(part.shape)
            shape[dim] = inputs[0].shape[1]
            out = part.new_empty(shape)
        out.narrow(dim, block.start, block.stop - block.start).copy_(part)
    return out


def block_gradients(
    function: Callable[..., Tensor],
    rows: int,
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    needed: Sequence[int],
    grad: Tensor,
    autocast: AutocastState,
    dim: int = 1,
) -> Iterator[tuple[slice, dict[int, Tensor]]]:
    """For one block of :func:`in_blocks` after the other, its rows and what it adds to the gradients.

    Whoever loops over it should empty the gradients, which may be as large as what is shared: the next block's are made
    meanwhile.

    Args:
        needed: which of ``(*inputs, *shared)`` need a gradient; these are the keys of the gradients.
        grad: gradient of the result.
        autocast: :func:`autocast_state` of the forward pass, in which each block is computed again.
    """
    device, dtype, enabled = autocast
    for block in _blocks(inputs, rows):
        args = [*(x[:, block] for x in inputs), *shared]
        for i in needed:
            args[i] = args[i].detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            part = function(*args)
        part_grad = grad.narrow(dim, block.start, block.stop - block.start) if inputs else grad
        yield block, dict(zip(needed, torch.autograd.grad(part, [args[i] for i in needed], part_grad)))


def autocast_state(device: torch.device) -> AutocastState:
    """Device type, dtype and whether mixed precision is on: what ``torch.autocast`` takes."""
    return device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)


def _tensors(arguments: Arguments) -> list[Tensor]:
    """All of them, which is how autograd takes them."""
    return [x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,))]


def _of_tensors(function: Callable[..., Tensor], arguments: Arguments) -> Callable[..., Tensor]:
    """``function``, which takes arguments of this form, of all their tensors one after the other."""
    forms = [(type(x)._make, len(x)) if isinstance(x, tuple) else None for x in arguments]
    if not any(forms):
        return function

    def call(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return function(*(next(rest) if form is None else form[0](islice(rest, form[1])) for form in forms))

    return call


def _at_once(inputs: Sequence[Tensor], rows: int) -> bool:
    """Whether one block is all: then nothing is put together."""
    return not inputs or inputs[0].shape[1] <= rows


def _blocks(inputs: Sequence[Tensor], rows: int) -> Iterator[slice]:
    if not inputs:
        return iter([slice(None)])
    total = inputs[0].shape[1]
    blocks = (slice(start, min(start + rows, total)) for start in range(0, total, rows))
    return each_block(blocks, lambda block: block.stop - block.start)
