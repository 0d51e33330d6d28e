"""What GPUs are told before a process first uses one."""

from __future__ import annotations

import os

import torch

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
DEFAULTS = {_ALLOCATOR: "expandable_segments:True", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""Variables of the environment that are set where the user has not. Segments that can grow: samples differ in size,
and with fixed ones what one sample leaves free is often too small for the next. And messages before computation: a
kernel of NCCL takes few multiprocessors, but it must not queue for them."""


def set_up_gpus(tf32: bool) -> None:
    """Set :data:`DEFAULTS`, for this process and those that it starts, and how fp32 matrix products are computed.

    Args:
        tf32: whether they may round their factors to TF32.
    """
    # The allocator's variable has an older name.
    named = _ALLOCATOR in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    for name, value in DEFAULTS.items():
        if not (named and name == _ALLOCATOR):
            os.environ.setdefault(name, value)
    # Not by ``fp32_precision``: what torch.compile reads of it raises where the older setting disagrees.
    torch.backends.cuda.matmul.allow_tf32 = tf32
