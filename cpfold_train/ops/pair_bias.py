"""The bias that attention between tokens takes from the pair representation. Local, a few rows at a time."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import layer_norm

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.regions import region


def pair_bias(
    z: Tensor, key_mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, inf: float
) -> Tensor:
    """``W norm(z_ij) - inf (1 - mask_ij)``, heads first, which is how attention wants it.

    Args:
        z: tile (B, N/R, N/C, c).
        key_mask: (B, N/R, N/C), 1 where the key is a real token.
        norm_weight, norm_bias: (c,).
        weight: (h, c).
        inf: how much is subtracted where it is not.

    Returns:
        Tile (B, h, N/R, N/C).
    """
    rows = rows_per_block(z[:, :1].numel() * z.element_size(), z.device)
    return by_rows(partial(_pair_bias, inf), rows, (z, key_mask), (norm_weight, norm_bias, weight), dim=2)


@region
def _pair_bias(
    inf: float, z: Tensor, key_mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor
) -> Tensor:
    x = layer_norm(z.to(weight.dtype), norm_weight.shape, norm_weight, norm_bias)
    return project_bias(x, key_mask, weight, inf)


def project_bias(x: Tensor, key_mask: Tensor, weight: Tensor, inf: float) -> Tensor:
    """:func:`pair_bias` of a tile x (B, N/R, N/C, c) that is normalised already, all at once."""
    bias = (weight @ x.flatten(1, 2).mT).unflatten(2, x.shape[1:3])
    return bias + (key_mask[:, None].to(bias.dtype) - 1) * inf
