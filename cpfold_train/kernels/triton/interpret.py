"""Triton's interpreter runs kernels on CPU tensors, where ``TRITON_INTERPRET=1`` is set before they are imported."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def product_type(dtype: torch.dtype) -> tl.dtype:
    """In what the operands of ``tl.dot`` are to be, for tensors of ``dtype``.

    The interpreter holds bf16 as bits and multiplies these; its products of fp32 are what matrix units make of bf16,
    exact products added up in fp32.
    """
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TYPES[dtype]
