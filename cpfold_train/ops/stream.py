"""Work on a sharded operand that is too large to gather: one piece at a time, the next one travelling meanwhile.

The pieces are fetched straight from the ranks that have them, and again in the backward pass, in which each piece's
gradient travels back while the next piece is worked on. So a rank never holds more than two pieces. Rings (pieces are
tiles), panels of the triangle bias and chunks of MSA depth are all of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cpfold_train.parallel.redistribute import Route

Step = Callable[..., Tensor]


def stream(
    step: Step,
    routes: Sequence[Sequence[Route]],
    local: Sequence[Tensor],
    sources: Sequence[Tensor],
    dim: int | None = None,
) -> Tensor:
    """``step(k, *local, *pieces_k)`` for k = 0, 1, ..., added up or joined.

    Args:
        step: differentiable. Everything that needs a gradient must be an argument.
        routes: for each k, how the piece of each source comes to this rank. All ranks must list the same steps.
        local: tensors that every step uses whole.
        sources: sharded tensors of which pieces are fetched.
        dim: where the parts are joined; None adds them up.

    Returns:
        The sum, or the parts joined along ``dim``.
    """
    return _Stream.apply(step, routes, dim, len(local), *local, *sources)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: Step, routes: Sequence[Sequence[Route]], dim: int | None, count: int, *tensors: Tensor):
        ctx.step, ctx.routes, ctx.dim, ctx.count = step, routes, dim, count
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        local, sources = tensors[:count], tensors[count:]
        parts: list[Tensor] = []
        for k, pieces in enumerate(pieces_in_turn(routes, sources)):
            part = step(k, *local, *pieces)
            if dim is None and parts:
                parts[0] += part
            else:
                parts.append(part)
            del part, pieces
        ctx.sizes = [1 if dim is None else part.shape[dim] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        local, sources = tensors[: ctx.count], tensors[ctx.count :]
        needs = ctx.needs_input_grad[4:]
        # Sums over many pieces: in bf16 they would stop growing.
        wide = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need else None
                for x, need in zip(tensors, needs)]  # fmt: skip
        grads = [grad] * len(ctx.routes) if ctx.dim is None else grad.split(ctx.sizes, ctx.dim)
        device, dtype, enabled = ctx.autocast
        returning: list[Returning] = []
        turns = zip(ctx.routes, pieces_in_turn(ctx.routes, sources), grads)
        for k, (here, pieces, part_grad) in enumerate(turns):
            needed = [i for i, need in enumerate(needs) if need]
            args = [x.detach().requires_grad_(need) for x, need in zip((*local, *pieces), needs)]
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                part = ctx.step(k, *args)
            found = dict(zip(needed, torch.autograd.grad(part, [args[i] for i in needed], part_grad)))
            for i in needed:
                if i < ctx.count:
                    wide[i] += found.pop(i)
            collect(returning)
            returning = [(here[i - ctx.count], piece_grad, wide[i]) for i, piece_grad in found.items()]
            give_back(returning)
            # None of it may live on beside the next step's.
            del part, pieces, args, found
        collect(returning)
        return None, None, None, None, *(g if g is None else g.to(x.dtype) for g, x in zip(wide, tensors))


def pieces_in_turn(routes: Sequence[Sequence[Route]], sources: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The pieces of each step, handed out when those of the next step are on their way.

    The list is emptied for the next step: whoever loops over it would else hold three steps' pieces.
    """
    coming = [route.fetch(x) for route, x in zip(routes[0], sources)]
    for here, following in zip(routes, [*routes[1:], ()]):
        pieces = [route.arrive(piece) for route, piece in zip(here, coming)]
        coming = [route.fetch(x) for route, x in zip(following, sources)]
        yield pieces
        pieces.clear()


Returning = tuple[Route, Tensor, Tensor]
"""How a piece came, its gradient, and the gradient of its source, to which the ranks that have it add."""


def give_back(returning: Sequence[Returning]) -> None:
    """Send the gradients of pieces on their way back."""
    for route, grad, _ in returning:
        route.give_back(grad)


def collect(returning: Sequence[Returning]) -> None:
    """Wait for the gradients of pieces and add them to those of the sources."""
    for route, grad, into in returning:
        into += route.collect(grad)
