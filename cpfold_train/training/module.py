"""The training task: a trunk and its loss under Lightning."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpfold_train.losses.distogram import distogram_loss
from cpfold_train.model.config import ModelConfig
from cpfold_train.model.trunk import Trunk
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.gather import gather_figures, gather_tensor
from cpfold_train.parallel.random import Draws
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.training import metrics
from cpfold_train.training.config import OptimConfig
from cpfold_train.training.optim import adamw_with_schedule, warmup_then_steps

Batch = dict[str, Tensor | DTensor | list[str]]


class CoFoldingModule(LightningModule):
    """Trains the trunk on its distogram loss.

    Args:
        model: sizes of the trunk.
        optim: optimizer and schedule.
        seed: of the recycling counts.

    Attributes:
        validation: means of the last validation by metric name; equal on all ranks.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.trunk = Trunk(model)
        self.validation: dict[str, float] = {}
        self._model, self._optim, self._seed = model, optim, seed
        self._sums = torch.zeros(len(VALIDATION) + 1, dtype=torch.float64)

    @property
    def cp(self) -> ContextParallel:
        """The running grid. The strategy owns it: process groups cannot be copied with the module."""
        return self.trainer.strategy.cp

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch.

        Returns:
            ``loss``, for the backward pass; ``loss_share``, this rank's part of the batch's mean loss; ``tokens``.
        """
        # Every rank and every grid draws the same count, also after a resume.
        step = [self._seed, self.global_step]
        recycling = int(np.random.default_rng(step).integers(0, self._model.recycling_steps + 1))
        out = self.trunk(batch, self.cp, recycling, Draws(batch["sample_key"]))
        share = distogram_loss(out["pdistogram"], batch, self.cp).mean()
        # DDP takes the mean over dp x cp ranks; the gradient is the mean over dp of the sum over cp.
        loss = share * self.cp.grid.cp_size
        return {"loss": loss, "loss_share": share.detach(), "tokens": batch["num_tokens"].sum()}

    def on_validation_epoch_start(self) -> None:
        self._sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, DTensor]:
        """Add a batch to the validation's sums.

        Returns:
            ``pdistogram``, for whoever wants to draw it.
        """
        out = self.trunk(batch, self.cp, self._model.recycling_steps, None)
        scores = score_samples(out["pdistogram"], batch, self.cp).double().cpu()
        # Replicas have equally many batches; what fills the last one up has been counted already.
        scores = torch.cat([scores, scores.new_ones(len(scores), 1)], 1)[~batch["filler"].cpu()]
        self._sums += scores.sum(0)
        return {"pdistogram": out["pdistogram"]}

    def on_validation_epoch_end(self) -> None:
        # All ranks of a replica hold the same sums: one of them speaks for it.
        sums = gather_figures(self.cp, self._sums.tolist())[:: self.cp.grid.cp_size].sum(0)
        means = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
        self.validation = dict(zip(VALIDATION, means))
        # For the callbacks that watch a metric. The values are equal on all ranks, and so is their mean.
        self.log_dict(self.validation, logger=False, sync_dist=True)

    def configure_optimizers(self) -> dict:
        o = self._optim
        factor = warmup_then_steps(o.warmup_steps, o.decay, o.decay_every)
        optimizer, schedule = adamw_with_schedule(self.trunk, o.lr, tuple(o.betas), o.eps, o.weight_decay, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


VALIDATION = ("val/loss", "val/contact_precision", "val/distance_lddt")
"""Columns of :func:`score_samples`."""


def score_samples(pdistogram: DTensor, batch: Batch, cp: ContextParallel) -> Tensor:
    """(B, 3): distogram loss, precision of the top L long-range contacts and lDDT of distances of each sample.

    L is the sample's number of resolved tokens. The result is the same on all ranks of the replica.
    """
    losses = distogram_loss(pdistogram, batch, cp)
    logits = pdistogram.to_local().squeeze(3)
    n = pdistogram.shape[1]
    rows, cols = cp.grid.row_tokens(n), cp.grid.col_tokens(n)
    centre, resolved, asym_id, residue_index = (
        batch[name].to_local() for name in ("disto_center", "token_disto_mask", "asym_id", "residue_index")
    )
    scores = []
    for b in range(len(logits)):
        expected, contact = metrics.read_distogram(logits[b])
        distance, valid = metrics.true_distances(centre[b], resolved[b], rows, cols)
        parts = torch.cat([losses[b, None], metrics.lddt_parts(expected, distance, valid)])
        loss, hits, pairs = all_reduce(parts, cp, cp.all, "metrics")
        top = int(resolved[b].sum())
        far = valid & metrics.long_range(asym_id[b], residue_index[b], rows, cols)
        candidates = gather_tensor(metrics.contact_candidates(contact, distance, far, top, rows, cols, n), cp.all)
        precision = metrics.precision(candidates.flatten(0, 1), top).to(loss.dtype)
        scores.append(torch.stack([loss, precision, hits / pairs.clamp(min=1)]))
    return torch.stack(scores)
