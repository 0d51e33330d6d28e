"""Distogram loss (AlphaFold 2, supplementary section 1.9.8; ``boltz/model/loss/distogramv2.py``), tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.parallel.context import ContextParallel


def distogram_loss(pdistogram: DTensor | Tensor, feats: dict[str, Tensor | DTensor], cp: ContextParallel) -> Tensor:
    """This rank's part of each sample's loss; the sum over the ranks of the replica is the loss.

    Cross-entropy against the mean over K conformers of the one-hot distance, over all ordered pairs of two different
    resolved tokens, computed in fp32 (or fp64).

    Args:
        pdistogram: logits (B, N, N, 1, bins), tiled.
        feats: ``disto_target`` (B, N, N, K) bin indices, tiled; ``token_disto_mask`` (B, N), replicated.
        cp: the running grid.

    Returns:
        (B,).
    """
    logits, target, resolved = (
        x.to_local() if isinstance(x, DTensor) else x
        for x in (pdistogram, feats["disto_target"], feats["token_disto_mask"])
    )
    logits = logits.squeeze(3)
    n = resolved.shape[1]
    rows, cols = cp.grid.row_tokens(n), cp.grid.col_tokens(n)
    position = torch.arange(n, device=logits.device)
    resolved = resolved.to(torch.promote_types(logits.dtype, torch.float32))
    pairs = resolved.sum(1).square() - resolved.square().sum(1)

    mask = pair_mask(resolved, cp.grid) * (position[slice(*rows), None] != position[slice(*cols)])

    rows_at_once = rows_per_block(logits[:, :1].numel() * mask.element_size(), mask.device)
    return by_rows(_errors, rows_at_once, (logits, target, mask), ()).sum(1) / (1e-5 + pairs)


def _errors(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Rows (B, r, N/C, ...) to each row's sum of masked cross-entropies (B, r)."""
    log_p = logits.to(mask.dtype).log_softmax(-1)
    return -(log_p.gather(-1, target.long()).mean(-1) * mask).sum(-1)
