"""Trading memory for arithmetic: parts of the graph that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

T = TypeVar("T")


def recompute(function: Callable[..., T], *args) -> T:
    """``function(*args)``, keeping only the arguments for the backward pass.

    Random draws are pure functions of their keys (:mod:`cpfold_train.parallel.random`), so no generator state is saved.
    The recomputation always runs to its end: stopping early could leave an exchange without its wait.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def by_rows(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """Apply a function that treats the rows (dim 1) independently to ``rows`` of them at a time.

    Args:
        function: takes the rows of each tensor, (B, rows, ...), and returns (B, rows, ...).
        rows: how many at a time; the last group may be smaller.
        tensors: (B, r, ...) with equal r.

    Returns:
        (B, r, ...). Inside, nothing but the inputs is kept for the backward pass.
    """
    parts = [recompute(function, *group) for group in zip(*(t.split(rows, 1) for t in tensors))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
