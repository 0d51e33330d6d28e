"""What the fused kernels of the local parts have in common: which tensors they take, and LayerNorm without parameters.

A norm's weight and bias can be made part of the projection that follows it, ``W (w * x + b) = (W * w) x + W b``. Then
the kernels only bring their input to mean 0 and variance 1, and the gradients of the norm's parameters come, through
these few small operations of autograd, from those of the projection, without a sum over all pairs of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.by_rows import autocast_state
from cpfold_train.kernels.regions import region

WIDTHS = (16, 32, 64, 128)
"""Channels of which a kernel holds whole pairs in registers."""


def takes(x: Tensor, channels: int, kernels: str) -> bool:
    """Whether a fused kernel computes it: not with ``torch``, nor in fp64, nor for other than :data:`WIDTHS`."""
    return kernels != "torch" and x.dtype != torch.float64 and channels in WIDTHS


def product_dtype(x: Tensor) -> torch.dtype:
    """In what the matrix products with ``x`` are: under autocast its dtype, else that of ``x``."""
    _, dtype, enabled = autocast_state(x.device)
    return dtype if enabled else x.dtype


@region
def folded(norm_weight: Tensor, norm_bias: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Projections (c_out, c) of what a LayerNorm returns, as one projection and bias (c_out,) of what it normalises,
    one below the other; both in fp32. Autocast leaves these operations alone."""
    weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).float()
    return weight * norm_weight.float(), (weight * norm_bias.float()).sum(1)
