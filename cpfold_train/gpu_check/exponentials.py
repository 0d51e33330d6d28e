"""A kernel that does nothing but exponentials, to time how many a GPU does in a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS, BLOCK, ROUNDS = 8, 2048, 4096
BLOCKS_EACH = 4
"""Blocks of a multiprocessor."""


@triton.jit
def _exponentials(out_ptr, rounds, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) * -1e-3
    for _ in range(rounds):
        # It stays between 0 and 1 and takes one addition to one exponential.
        x = tl.exp2(x - 1.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def exponentials_of(multiprocessors: int) -> int:
    """How many a call of :func:`exponentials` does."""
    return multiprocessors * BLOCKS_EACH * BLOCK * ROUNDS


def exponentials(multiprocessors: int) -> torch.Tensor:
    """Fill a GPU of so many multiprocessors with exponentials."""
    blocks = multiprocessors * BLOCKS_EACH
    out = torch.empty(blocks * BLOCK, device="cuda")
    _exponentials[(blocks,)](out, ROUNDS, BLOCK=BLOCK, num_warps=WARPS)
    return out
