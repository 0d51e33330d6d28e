"""Work on a sharded operand that is too large to gather: one piece at a time, the next one travelling meanwhile.

The pieces come straight from the ranks that have them, and again in the backward pass, in which each piece's gradient
travels back while the next piece is worked on. So a rank never holds more than two pieces. Rings (pieces are tiles),
chunks of heads of the triangle bias and chunks of MSA depth are all of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import autocast_state, block_gradients, in_blocks
from cpfold_train.parallel.exchange_plan import ExchangePlan, GradInFlight, InFlight

Step = Callable[..., Tensor]
Gradients = Callable[..., Sequence[Tensor | None]]


def stream(
    step: Step,
    plans: Sequence[Sequence[ExchangePlan]],
    shared: Sequence[Tensor],
    sources: Sequence[Tensor],
    dim: int | None = None,
    inputs: Sequence[Tensor] = (),
    rows: int = 1,
    gradients: Gradients | None = None,
    parts: Sequence[slice] | None = None,
) -> Tensor:
    """``step(k, *inputs, *shared, *pieces_k)`` for k = 0, 1, ..., added up or joined.

    Args:
        step: differentiable. Everything that needs a gradient must be an argument.
        plans: for each k, how the piece of each source comes to this rank. All ranks must list the same steps.
        shared: tensors that every step uses whole.
        sources: sharded tensors whose pieces are worked on.
        dim: where the parts are joined; None adds them up.
        inputs: tensors (B, r, ...) whose rows each step treats independently; its result has the same rows.
        rows: how many of them a step gets at a time, as in :func:`~cpfold_train.kernels.by_rows.by_rows`.
        gradients: where ``step`` is not differentiable, ``gradients(k, grad, *shared, *pieces_k)``, a gradient or None
            for each of the tensors. Without it a step is computed again in the backward pass.
        parts: where each step takes a part of dim 1 of all sources, and no two steps the same, these parts; the plans
            are those of the parts.

    Returns:
        The sum, or the parts joined along ``dim``.
    """
    counts = len(inputs), len(shared)
    return _Stream.apply(step, gradients, plans, parts, dim, rows, counts, *inputs, *shared, *sources)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        step: Step,
        gradients: Gradients | None,
        plans: Sequence[Sequence[ExchangePlan]],
        source_parts: Sequence[slice] | None,
        dim: int | None,
        rows: int,
        counts: tuple[int, int],
        *tensors: Tensor,
    ):
        ctx.step, ctx.gradients, ctx.plans, ctx.parts = step, gradients, plans, source_parts
        ctx.dim, ctx.rows, ctx.counts = dim, rows, counts
        ctx.save_for_backward(*tensors)
        ctx.autocast = autocast_state(tensors[0].device)
        inputs, shared, sources = _groups(tensors, counts)
        parts: list[Tensor] = []
        for k, pieces in enumerate(pieces_in_turn(plans, sources, source_parts)):
            part = in_blocks(partial(step, k), rows, inputs, (*shared, *pieces))
            dtype = part.dtype
            if dim is None and parts:
                parts[0] += part
            elif dim is None and len(plans) > 1:
                parts.append(part.to(torch.promote_types(dtype, torch.float32)))
            else:
                parts.append(part)
            del part, pieces
        ctx.sizes = [1 if dim is None else part.shape[dim] for part in parts]
        return parts[0].to(dtype) if len(parts) == 1 else torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        inputs, shared, sources = _groups(tensors, ctx.counts)
        local = len(inputs) + len(shared)
        needs = ctx.needs_input_grad[7:]
        needed = [i for i, need in enumerate(needs) if need]
        once = len(ctx.plans) == 1 or ctx.parts is not None

        def zeros(i: int, x: Tensor) -> Tensor:
            # Sums over many pieces: in bf16 they would stop growing.
            summed = i < local or not once
            return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32) if summed else x.dtype)

        sums = [zeros(i, x) if need else None for i, (x, need) in enumerate(zip(tensors, needs))]
        grads = [grad] * len(ctx.plans) if ctx.dim is None else grad.split(ctx.sizes, ctx.dim)
        returning: list[Returning] = []
        turns = zip(ctx.plans, pieces_in_turn(ctx.plans, sources, ctx.parts), grads)
        for k, (here, pieces, part_grad) in enumerate(turns):
            back: dict[int, Tensor] = {}
            if ctx.gradients is None:
                blocks = block_gradients(
                    partial(ctx.step, k), ctx.rows, inputs, (*shared, *pieces), needed, part_grad, ctx.autocast
                )
            else:
                given = dict(enumerate(ctx.gradients(k, part_grad, *shared, *pieces)))
                blocks = ((slice(None), {i: given[i] for i in needed if given[i] is not None}),)
                del given
            for block, found in blocks:
                while found:
                    i, g = found.popitem()
                    if i < len(inputs):
                        sums[i][:, block] += g
                    elif i < local:
                        sums[i] += g
                    elif i in back:
                        back[i] += g
                    else:
                        # Of one block it is the whole, of several the first addend.
                        back[i] = g if inputs == () else g.to(torch.promote_types(g.dtype, torch.float32))
            wait_grads(returning)
            part = slice(None) if ctx.parts is None else ctx.parts[k]
            back = {i: g.to(tensors[i].dtype) for i, g in back.items()}
            returning = [(here[i - local].send_grad(g), sums[i][:, part]) for i, g in back.items()]
            # None of it may live on beside the next step's.
            del pieces, blocks, back
        wait_grads(returning)
        return *(None,) * 7, *(g if g is None else g.to(x.dtype) for g, x in zip(sums, tensors))


def _groups(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[Sequence[Tensor], ...]:
    inputs, shared = counts
    return tensors[:inputs], tensors[inputs : inputs + shared], tensors[inputs + shared :]


def pieces_in_turn(
    plans: Sequence[Sequence[ExchangePlan]], sources: Sequence[Tensor], parts: Sequence[slice] | None = None
) -> Iterator[list[Tensor]]:
    """The pieces of each step; of parts as in :func:`stream`."""

    def send(k: int) -> list[InFlight]:
        return [plan.send_forward(x if parts is None else x[:, parts[k]]) for plan, x in zip(plans[k], sources)]

    return in_turn(len(plans), send)


def in_turn(turns: int, send: Callable[[int], list[InFlight]]) -> Iterator[list[Tensor]]:
    """What ``send(k)`` brings for k = 0, 1, ..., handed out when that of the next turn is on its way.

    The list is emptied for the next turn: a loop over it would else hold three turns' tensors.
    """
    coming = send(0)
    for k in range(turns):
        arrived = [flight.wait() for flight in coming]
        coming = send(k + 1) if k + 1 < turns else []
        yield arrived
        arrived.clear()


Returning = tuple[GradInFlight, Tensor]
"""The gradient of a piece, and that of its source, to which the ranks that have it add."""


def wait_grads(returning: Sequence[Returning]) -> None:
    """Wait for the gradients of pieces and add them to those of the sources."""
    for flight, total in returning:
        total += flight.wait()
