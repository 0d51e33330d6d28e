"""Pair weighted averaging: each MSA row is averaged over tokens with weights from the pair representation.

AlphaFold 3, Algorithm 10. The weights of a token are a softmax over a whole row of z, but have only h channels: rank
(I, J), which holds tokens N_J of the MSA, fetches the rows N_J of the logits, (N/C) N h elements. The values of its
sequences are gathered along the token axis, (S/R) N h d elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import bands_of_tile_cols, row_bands, tiles
from cpfold_train.parallel.redistribute import finish, start


def pair_weighted_averaging(v: Tensor, logits: Tensor, key_mask: Tensor, cp: ContextParallel) -> Tensor:
    """``o_si = sum_j softmax_j(logits_ij) v_sj`` for each head.

    Args:
        v: MSA block (B, S/R, N/C, h, d).
        logits: pair tile (B, N/R, N/C, h).
        key_mask: (B, N), 1 for real tokens.
        cp: the running grid.

    Returns:
        MSA block (B, S/R, N/C, h, d).
    """
    s, n, op = v.shape[1] * cp.grid.rows, v.shape[2] * cp.grid.cols, "pair_weighted_averaging"
    has, wants = tiles(cp.grid, n, n), bands_of_tile_cols(cp.grid, n)
    logits_coming = start(logits.permute(0, 3, 1, 2), cp, cp.all, (2, 3), has, wants, op)
    v_coming = start(v.permute(0, 3, 1, 2, 4), cp, cp.all, (2, 3), tiles(cp.grid, s, n), row_bands(cp.grid, s, n), op)

    logits = finish(logits_coming).to(torch.promote_types(logits.dtype, torch.float32))
    weights = (logits + (key_mask.to(logits.dtype)[:, None, None] - 1) * 1e6).softmax(-1).to(v.dtype)
    o = weights[:, :, None] @ finish(v_coming)
    return o.permute(0, 2, 3, 1, 4)
