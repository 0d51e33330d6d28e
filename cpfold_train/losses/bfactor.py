"""B-factor loss (``boltz/model/loss/bfactor.py``), shard by shard of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.shards import gather_shards, own_shard
from cpfold_train.parallel.context import ContextParallel

OP = "bfactor_loss"
HIGHEST = 100.0
"""Square Angstrom; the last bin is everything above."""


def bfactor_loss(pbfactor: Tensor, feats: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    """This rank's part of each sample's loss; the sum over the ranks is the loss.

    Cross-entropy against the bin of the representative atom's B-factor, over the tokens that have one. The package
    takes the mean over the tokens of all samples of a batch, which is the same for one sample.

    Args:
        pbfactor: logits (B, N, bins), replicated.
        feats: ``bfactor`` (B, A/P), shard of atoms; ``token_to_rep_atom`` and ``token_pad_mask`` (B, N), replicated.
        cp: the running grid.

    Returns:
        (B,).
    """
    logits = own_shard(pbfactor, cp)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bfactor = gather_shards(feats["bfactor"].to(logits.dtype), cp, OP).gather(1, feats["token_to_rep_atom"].long())
    known = ((bfactor > 1e-5) & (feats["token_pad_mask"] > 0)).to(logits)
    own = own_shard(bfactor, cp)
    boundaries = torch.linspace(0, HIGHEST, logits.shape[2] - 1, device=logits.device)
    target = (own[..., None] > boundaries).sum(-1, keepdim=True)
    errors = -logits.log_softmax(-1).gather(-1, target).squeeze(-1)
    return (errors * own_shard(known, cp)).sum(1) / (known.sum(1) + 1e-5)
