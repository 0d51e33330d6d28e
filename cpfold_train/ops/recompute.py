"""Trading memory for arithmetic: parts of the graph that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint, noop_context_fn, set_checkpoint_early_stop

from cpfold_train.kernels.kept import KeptResults, are_kept

T = TypeVar("T")


def recompute(function: Callable[..., T], *args, results: KeptResults | None = None) -> T:
    """``function(*args)``, keeping only the arguments for the backward pass, and ``results`` of its kernels if given.

    Random draws are pure functions of their keys (:mod:`cpfold_train.parallel.random`), so no generator state is saved.
    The recomputation always runs to its end: stopping early could leave an exchange without its wait.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    with set_checkpoint_early_stop(False):
        if results is None and are_kept():
            results = KeptResults()
        contexts = noop_context_fn if results is None else lambda: (results.made(), results.used())
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def call(function: Callable[..., T], *args) -> T:
    """``function(*args)``: to be called instead of :func:`recompute` where nothing is computed again."""
    return function(*args)
