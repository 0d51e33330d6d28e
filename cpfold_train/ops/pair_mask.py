"""From a mask of tokens to the mask of this rank's pairs."""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.grid import Grid


def pair_mask(token_mask: Tensor, grid: Grid) -> Tensor:
    """``mask_i mask_j`` as a tile (B, N/R, N/C), from ``token_mask`` (B, N), which every rank holds."""
    n = token_mask.shape[1]
    return token_mask[:, slice(*grid.row_tokens(n)), None] * token_mask[:, None, slice(*grid.col_tokens(n))]
