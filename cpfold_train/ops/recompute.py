"""Trading memory for arithmetic: parts of the graph that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
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


def call(function: Callable[..., T], *args) -> T:
    """``function(*args)``: what takes the place of :func:`recompute` where nothing is computed again."""
    return function(*args)
