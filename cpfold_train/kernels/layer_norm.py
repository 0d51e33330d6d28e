"""LayerNorm over the last dim, read once and written once in the dtype that the next product takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str, dtype: torch.dtype | None = None
) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-5) * weight + bias``, statistics in fp32 at least.

    Args:
        x: (..., c), any float dtype.
        weight: (c,).
        bias: (c,), or None.
        kernels: ``torch``, ``triton`` or ``cuequivariance``.
        dtype: of the result; None is that of ``x``.

    Returns:
        (..., c).
    """
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, EPS).to(dtype or x.dtype)
