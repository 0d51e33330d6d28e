"""A stack of blocks, and what is kept between them for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from cpfold_train.kernels.kept import KeptResults
from cpfold_train.model.config import MemoryConfig
from cpfold_train.ops.offload import Boundary, kept_on_host
from cpfold_train.ops.recompute import call, recompute


def kept_results(memory: MemoryConfig, boundary: Boundary | None) -> KeptResults | None:
    """What keeps attention's results of a part that is recomputed: here, or of a boundary on the host."""
    if not memory.keep_attention:
        return None
    return KeptResults() if boundary is None else KeptResults(boundary.hold)


def run_blocks(
    block: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    count: int,
    z: Tensor,
    other: Tensor,
    memory: MemoryConfig,
) -> tuple[Tensor, Tensor]:
    """``z, other = block(i, z, other)`` for i = 0 ... ``count`` - 1.

    Of n blocks that are recomputed, g at once, n / g + g pairs of z and the other are kept at most, instead of n.

    Args:
        block: one block; the other representation is s or m.
        count: how many there are.
        z: pair tile (B, N/R, N/C, token_z).
        other: of any shape.
        memory: what is kept, where, and in which precision.
    """
    wide = z.dtype
    between = torch.bfloat16 if memory.residual == "bf16" else wide

    def rounded(i: int, z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        # Rounded once a block, not with each of its updates.
        z, other = block(i, z.to(wide), other)
        return z.to(between), other

    def in_turn(run: Callable, blocks: range, z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        for i in blocks:
            z, other = run(rounded, i, z, other)
        return z, other

    boundary: Boundary | None = None

    def kept(function: Callable, *args) -> tuple[Tensor, Tensor]:
        nonlocal boundary
        with kept_on_host(boundary) if memory.offload else nullcontext() as boundary:
            return recompute(function, *args, results=kept_results(memory, boundary))

    z, every = z.to(between), range(count)
    if not memory.recompute:
        z, other = in_turn(call, every, z, other)
    elif memory.blocks_at_once == 1:
        z, other = in_turn(kept, every, z, other)
    else:
        for first in range(0, count, memory.blocks_at_once):
            group = every[first : first + memory.blocks_at_once]
            z, other = kept(in_turn, recompute, group, z, other)
    return z.to(wide), other
