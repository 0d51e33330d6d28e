"""Softmax over the last dim of logits with a key mask; see :mod:`cpfold_train.kernels.pair_weighted_averaging`.

A program has one row. It goes over it twice, a block of keys at a time, first for the row's maximum and sum, or for the
sum that the backward pass needs, then for what is written; a row of 3,072 bf16 values is 6 KB, and the second reading
comes from cache. Rows may have any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch

BLOCK = 1024
WARPS = 4
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Below any masked logit, and finite: the difference of two of them is no NaN."""


@triton.jit
def _scores(logits_ptr, mask_ptr, start, columns, N, MASKED: tl.constexpr):
    """Logits of a block of keys, times log2(e); minus infinity behind the last key."""
    here = start + columns < N
    x = tl.load(logits_ptr + start + columns, mask=here, other=0.0).to(tl.float32)
    x += (tl.load(mask_ptr + start + columns, mask=here, other=1.0) - 1) * MASKED
    return tl.where(here, x * LOG2E, float("-inf"))


@triton.jit
def forward(logits_ptr, mask_ptr, out_ptr, rows_of_sample, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax of one row (N,) of logits a program, in two passes over it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * N
    mask_ptr += row // rows_of_sample * N
    columns = tl.arange(0, BLOCK)
    # Each lane has a maximum and a sum of its own, which are merged at the end.
    row_max = tl.full([BLOCK], LOWEST, tl.float32)
    denom = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        x = _scores(logits_ptr, mask_ptr, start, columns, N, MASKED)
        before = row_max
        row_max = tl.maximum(row_max, x)
        denom = denom * tl.exp2(before - row_max) + tl.exp2(x - row_max)
    peak = tl.max(row_max, 0)
    scale = 1 / tl.sum(denom * tl.exp2(row_max - peak), 0)
    for start in range(0, N, BLOCK):
        weights = tl.exp2(_scores(logits_ptr, mask_ptr, start, columns, N, MASKED) - peak) * scale
        here = start + columns < N
        tl.store(out_ptr + row * N + start + columns, weights.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def backward(weights_ptr, grad_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Gradient of the logits of one row (N,) a program, in two passes over it."""
    row = tl.program_id(0).to(tl.int64) * N
    columns = tl.arange(0, BLOCK)
    denom = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        at, here = row + start + columns, start + columns < N
        weights = tl.load(weights_ptr + at, mask=here, other=0.0).to(tl.float32)
        denom += weights * tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
    shift = tl.sum(denom, 0)
    for start in range(0, N, BLOCK):
        at, here = row + start + columns, start + columns < N
        weights = tl.load(weights_ptr + at, mask=here, other=0.0).to(tl.float32)
        out = weights * (tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32) - shift)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here)


def masked_softmax(logits: Tensor, key_mask: Tensor, masked: float, dtype: torch.dtype) -> Tensor:
    """Of contiguous (B, h, M, N), with a mask (B, N) in fp32."""
    heads, queries, keys = logits.shape[1:]
    out = torch.empty_like(logits, dtype=dtype)
    rows = logits.numel() // keys
    forward[(rows,)](logits, key_mask, out, heads * queries, keys, masked, BLOCK, num_warps=WARPS)
    return out


def masked_softmax_backward(weights: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Of contiguous (B, h, M, N) both."""
    keys = weights.shape[-1]
    out = torch.empty_like(weights, dtype=dtype)
    backward[(weights.numel() // keys,)](weights, grad, out, keys, BLOCK, num_warps=WARPS)
    return out


LAUNCHES = [
    Launch(
        "masked_softmax",
        forward,
        {"logits_ptr": "*bf16", "mask_ptr": "*fp32", "out_ptr": "*bf16", "rows_of_sample": "i32", "N": "i32"},
        {"MASKED": 1e6, "BLOCK": BLOCK},
        WARPS,
        1,
    ),
    Launch(
        "masked_softmax backward",
        backward,
        {"weights_ptr": "*bf16", "grad_ptr": "*bf16", "out_ptr": "*bf16", "N": "i32"},
        {"BLOCK": BLOCK},
        WARPS,
        1,
    ),
]
