"""The training task: the model and its losses under Lightning."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpfold_train.checkpoints.features import told_features
from cpfold_train.config.schema import CONFIDENCE, DiffusionRunConfig, FinetuneConfig, LossConfig, OptimConfig
from cpfold_train.losses.total import confidence_losses, structure_losses
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.model.flops import Passes, SampleSizes, step_flops
from cpfold_train.parallel.context import ContextParallel, to_local
from cpfold_train.parallel.gather import gather_numbers
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.reports.metrics import VALIDATION, measured
from cpfold_train.training.ema import MovingAverage
from cpfold_train.training.freeze import require_fit, require_same
from cpfold_train.training.learning_rates import learning_rate_factors
from cpfold_train.training.lightning_loop import micro_batches
from cpfold_train.training.optim import adamw_with_schedule, warmup_then_steps
from cpfold_train.training.validation import score_distances, score_structures

Batch = dict[str, Tensor | DTensor | list[str]]


class CoFoldingModule(LightningModule):
    """Trains the model on the weighted sum of its losses.

    Args:
        model: sizes.
        memory: what is kept for the backward pass.
        optim: optimizer and schedule.
        loss: weights of the losses.
        diffusion: noised copies and sampled structures.
        seed: of the recycling counts.
        finetune: how fast which part learns; None: all at one rate.

    Attributes:
        trains_confidence: whether the confidence module is trained: on structures that are sampled in training, and
            measured on those of validation.
        bad_losses: micro-batches whose part of the loss was not finite on this rank.
        too_large: whether the step at hand is to be skipped on all ranks, because one has no memory for it.
        validation: means of the last validation by metric name, of those that any crop had pairs for; equal on all
            ranks.
        left_out: crops of the last validation that had no pair to score, by metric; only of those where there are any.
    """

    def __init__(
        self,
        model: ModelConfig,
        memory: MemoryConfig,
        optim: OptimConfig,
        loss: LossConfig,
        diffusion: DiffusionRunConfig,
        seed: int,
        finetune: FinetuneConfig | None = None,
    ) -> None:
        super().__init__()
        self._finetune = finetune or FinetuneConfig()
        self.save_hyperparameters({"model": asdict(model), "finetune": asdict(self._finetune)}, logger=False)
        self.model = CoFolding(model, memory)
        self.validation: dict[str, float] = {}
        self._recycling, self._optim, self._diffusion, self._seed = model.recycling_steps, optim, diffusion, seed
        self._sizes = model
        self._weights: dict[str, float] = asdict(loss)
        self.trains_confidence = loss.of_confidence
        self.bad_losses = torch.zeros((), dtype=torch.int64)
        self.too_large = False
        self._sums = torch.zeros(2, len(VALIDATION), dtype=torch.float64)
        self.left_out: dict[str, int] = {}

    @property
    def cp(self) -> ContextParallel:
        """The running grid. The strategy owns it: process groups cannot be copied with the module."""
        return self.trainer.strategy.cp

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | dict[str, Tensor]]:
        """One micro-batch.

        Returns:
            ``loss``, for the backward pass; ``partial_losses``, this rank's part of the batch's mean losses by name,
            ``loss`` their weighted sum; ``tokens``; ``flops``, the operations of all ranks that share the batch
            (:mod:`cpfold_train.model.flops`).
        """
        if self.too_large:
            # A gradient that is not a number, so that the step is skipped as all that have one.
            trained = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters() if p.requires_grad]
            loss = sum(p.sum() for p in trained) * torch.nan
            return {
                "loss": loss,
                "partial_losses": {"loss": loss.detach()},
                "tokens": batch["num_tokens"].sum(),
                "flops": 0.0,
            }
        # Every rank and every grid draws the same count, also after a resume.
        step = [self._seed, self.global_step]
        recycling = int(np.random.default_rng(step).integers(0, self._recycling + 1))
        return self.micro_batch(batch, recycling) | {"flops": self._flops(batch, recycling)}

    def backward(self, loss: Tensor) -> None:
        """The gradient of a step is the mean over its micro-batches. Lightning has divided the loss by
        ``accumulate_grad_batches``, of which the last step of an epoch may have fewer."""
        there_are = micro_batches(self.trainer, self.trainer.train_dataloader.first)
        # The NaN of a step that is skipped for want of memory is no anomaly.
        with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled() and not self.too_large):
            super().backward(loss * (self.trainer.accumulate_grad_batches / there_are))

    def _flops(self, batch: Batch, recycling: int) -> float:
        """Operations of a micro-batch on all ranks of a replica, from the global shapes of its features."""
        b, s, n = batch["msa"].shape
        sizes = SampleSizes(b, n, s, batch["ref_pos"].shape[1], batch["template_mask"].shape[1])
        drawn = self._diffusion
        passes = Passes(recycling, drawn.multiplicity, drawn.sampling_steps, drawn.samples, self.trains_confidence)
        return step_flops(self._sizes, sizes, passes)

    def micro_batch(self, batch: Batch, recycling: int) -> dict[str, Tensor | dict[str, Tensor]]:
        """What :meth:`training_step` returns, with so many recycling steps."""
        draws = RandomStreams(batch["sample_key"])
        out, losses = self._losses(batch, recycling, draws)
        if self.trains_confidence:
            sampling = {"sampling_steps": self._diffusion.sampling_steps, "samples": self._diffusion.samples}
            coords = self.model.sample(out, batch, self.cp, draws=draws, **sampling)
            logits = self.model.predict_confidence(out, coords, batch, self.cp, draws)
            losses |= confidence_losses(logits, coords, batch, self.cp)
        partial = {name: loss.mean() for name, loss in losses.items()}
        partial["loss"] = self._weighted(partial)
        # DDP takes the mean over dp x cp ranks; the gradient is the mean over dp of the sum over cp.
        loss = partial["loss"] * self.cp.grid.cp_size
        partial = {name: loss.detach() for name, loss in partial.items()}
        self.bad_losses = self.bad_losses.to(loss.device) + ~partial["loss"].isfinite()
        # The factor is 1, or not a number where the loss is not finite: then the gradient of all ranks is not, too.
        loss = loss * (1 + 0 * partial["loss"])
        return {"loss": loss, "partial_losses": partial, "tokens": batch["num_tokens"].sum()}

    def on_validation_epoch_start(self) -> None:
        self._sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, DTensor]:
        """Add a batch to the validation's sums.

        Returns:
            ``pdistogram``, for plots.
        """
        draws = RandomStreams(batch["sample_key"])
        out, losses = self._losses(batch, self._recycling, draws)
        absent = torch.full_like(losses["distogram"], torch.nan)
        structure, confidence = absent, {}
        if steps := self._diffusion.validation_steps:
            coords = self.model.sample(out, batch, self.cp, sampling_steps=steps, samples=1, draws=draws)
            structure = score_structures(coords, batch, self.cp)
            if self.trains_confidence:
                logits = self.model.predict_confidence(out, coords, batch, self.cp, None)
                confidence = confidence_losses(logits, coords, batch, self.cp)
        heads = [confidence.get(name, absent) for name in CONFIDENCE]
        partial = torch.stack([self._weighted(losses | confidence), losses["distogram"], *heads], 1)
        reduced = all_reduce(partial, self.cp, self.cp.all, "metrics")
        distances = score_distances(out["pdistogram"], batch, self.cp)
        # In the order of VALIDATION.
        parts = reduced[:, :2], distances, structure[:, None], reduced[:, 2:]
        scores = torch.cat([part.double().cpu() for part in parts], 1)
        # Scores of nothing are not numbers. A loss that is none is told to what watches it.
        counted = ~scores.isnan()
        counted[:, 0], counted[:, 5:] = True, True
        counted[:, 1] = to_local(batch)["token_disto_mask"].sum(1).cpu() > 1
        # Replicas have equally many batches; what fills the last one up has been counted already.
        own = ~batch["filler"].cpu()
        self._sums += torch.stack([scores.where(counted, 0), counted])[:, own].sum(1)
        return {"pdistogram": out["pdistogram"]}

    def on_validation_epoch_end(self) -> None:
        # All ranks of a replica hold the same sums: one of them speaks for it.
        gathered = gather_numbers(self.cp, self._sums.flatten().tolist())[:: self.cp.grid.cp_size].sum(0)
        sums, counts = gathered.view(2, -1).tolist()
        has = measured(bool(self._diffusion.validation_steps), self.trains_confidence)
        found = {name: (total, count) for name, total, count in zip(VALIDATION, sums, counts) if name in has}
        self.validation = {name: total / count for name, (total, count) in found.items() if count}
        crops = int(counts[0])
        left_out = {name: crops - int(count) for name, (_, count) in found.items() if count < crops}
        if left_out and left_out != self.left_out and self.trainer.is_global_zero:
            which = ", ".join(f"{count} of {name}" for name, count in left_out.items())
            print(f"of {crops} crops of validation some have no pair to score and are left out of means: {which}",
                  file=sys.stderr)  # fmt: skip
        self.left_out = left_out
        # For the callbacks that watch a metric. The values are equal on all ranks, and so is their mean.
        self.log_dict(self.validation, logger=False, sync_dist=True)

    def configure_optimizers(self) -> dict:
        o = self._optim
        factor = warmup_then_steps(o.warmup_steps, o.decay, o.decay_every)
        rates = learning_rate_factors(self.model, self._finetune.layer_decay, self._finetune.lr_groups or {})
        optimizer, schedule = adamw_with_schedule(
            self.model, o.lr, tuple(o.betas), o.eps, o.weight_decay, factor, rates
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ConfigError where the checkpoint is of another model, or other weights are trained than in it, or in
        other groups."""
        require_same(self._finetune, checkpoint, self.model)
        require_fit(self.state_dict(), checkpoint["state_dict"])
        note = told_features(self._sizes.features, checkpoint, "the checkpoint", "data.features=")
        if note and self.trainer.is_global_zero:
            print(f"note: {note}", file=sys.stderr)
        averages = any(isinstance(callback, MovingAverage) for callback in self.trainer.callbacks)
        if "current_model_state" in checkpoint and not averages:
            # Without an average of its own the run goes on from the weights under training.
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def _losses(
        self, batch: Batch, recycling: int, draws: RandomStreams
    ) -> tuple[dict[str, DTensor], dict[str, Tensor]]:
        """What the model returns, and this rank's partial losses (B,) of its structures."""
        out = self.model(
            batch, self.cp, recycling_steps=recycling, multiplicity=self._diffusion.multiplicity, draws=draws
        )
        return out, structure_losses(out, batch, self.cp, self._sizes.diffusion.sigma_data)

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        return sum(self._weights[name] * loss for name, loss in losses.items())
