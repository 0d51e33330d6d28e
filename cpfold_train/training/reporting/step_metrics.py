"""The metrics of each step: measured on every rank, combined, sent to the loggers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from cpfold_train.faults.skip import SkipBadSteps
from cpfold_train.memory import peak_mib
from cpfold_train.parallel.gather import gather_numbers
from cpfold_train.reports.metrics import COMMUNICATION
from cpfold_train.training.optim import base_rate
from cpfold_train.training.reporting.stopwatch import Stopwatch


class StepMetrics(Callback):
    """One row of metrics every ``log_every_n_steps`` optimizer steps, and the validation's beside it.

    Losses are summed over the grid and averaged over the replicas, so a curve does not depend on the grid. Tokens are
    those of all replicas. ``data_wait_s`` is what the rank that waited longest for data waited within the step,
    ``quarantined`` how many samples could not be used since the start. Memory is the highest peak of a rank since the
    start; bytes sent and exposed communication are means over ranks within the step. Throughput is that of training
    alone, without waiting for data: tokens and model FLOPs (:mod:`cpfold_train.model.flops`) of all replicas by
    ``step_s`` and by the number of ranks; ``mfu`` is the latter divided by the peak of ``peak_flops``.

    Args:
        skip: knows how many steps were skipped since the start.
        peak_flops: operations a second that the device has at its best; None where that is not known, as of CPUs.

    Attributes:
        watch: time spent on training steps since the start.
        row: of the last step that was logged; empty before the first.
    """

    watch: Stopwatch

    def __init__(self, skip: SkipBadSteps, peak_flops: float | None = None) -> None:
        self._skip, self._peak_flops = skip, peak_flops
        self.row: dict[str, float] = {}
        self._in_validation = torch.zeros(2, dtype=torch.float64)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch = Stopwatch(trainer.strategy.root_device)
        self._start_step(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.watch.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._due(trainer, trainer.global_step + 1):
            self._lr = base_rate(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.watch.stop()
        self._batches.append((outputs["partial_losses"], outputs["tokens"], outputs["flops"]))
        if trainer.global_step > self._step:
            if self._due(trainer, trainer.global_step):
                self._log_step(trainer, batch["crop_size"])
            self._start_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = self._communicated(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_validation += self._communicated(trainer) - self._before_validation
        for logger in trainer.loggers:
            logger.log_metrics(pl_module.validation, step=trainer.global_step)

    def _start_step(self, trainer: Trainer) -> None:
        self._step, self._batches = trainer.global_step, []
        self._waited_before = trainer.train_dataloader.waited_s
        if self._due(trainer, self._step + 1):
            # On GPUs asking waits for what is under way.
            self._before_step, self._worked_before = self._communicated(trainer), self.watch.seconds()

    def _communicated(self, trainer: Trainer) -> Tensor:
        """(2,): MiB that this rank has sent, and seconds it has waited, in training since the start."""
        total = trainer.strategy.cp.ledger.total()
        return torch.tensor([total.sent_bytes / 2**20, total.waited_s], dtype=torch.float64) - self._in_validation

    @staticmethod
    def _due(trainer: Trainer, step: int) -> bool:
        return step % trainer.log_every_n_steps == 0

    def _log_step(self, trainer: Trainer, crop_size: int) -> None:
        cp = trainer.strategy.cp
        partial, tokens, flops = zip(*self._batches)
        losses = {f"train/{name}": torch.stack([loss[name] for loss in partial]).double() for name in partial[0]}
        numbers = gather_numbers(
            cp,
            [
                torch.stack(tokens).sum().item() / cp.grid.cp_size,
                self.watch.seconds() - self._worked_before,
                trainer.train_dataloader.waited_s - self._waited_before,
                trainer.datamodule.quarantined / cp.grid.cp_size,
                peak_mib(trainer.strategy.root_device),
                *(self._communicated(trainer) - self._before_step).tolist(),
                sum(flops) / cp.grid.cp_size,
                *(loss.mean().item() for loss in losses.values()),
            ],
        )
        total, mean, largest = numbers.sum(0).tolist(), numbers.mean(0).tolist(), numbers.amax(0).tolist()
        row = {
            **{name: value / cp.grid.dp for name, value in zip(losses, total[8:])},
            "lr": self._lr,
            "grad_norm": self._skip.grad_norm.item(),
            "tokens": round(total[0]),
            "crop_size": crop_size,
            "step_s": mean[1],
            "data_wait_s": largest[2],
            "quarantined": round(total[3]),
            "skipped": self._skip.skipped,
            "peak_memory_mib": largest[4],
            "sent_mib": mean[5],
            "exposed_comm_s": mean[6],
            "tokens_per_s": total[0] / cp.grid.world_size / mean[1],
            "tflops": mean[7] / mean[1] / 1e12,
        }
        if self._peak_flops:
            row["mfu"] = mean[7] / mean[1] / self._peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(row | _by_op(trainer), step=trainer.global_step)
        self.row = row


def _by_op(trainer: Trainer) -> dict[str, float]:
    """What this rank has sent and waited for since the start, by operation."""
    found = {}
    for op, entry in trainer.strategy.cp.ledger.by_op().items():
        values = entry.sent_bytes / 2**20, entry.waited_s
        found |= {f"comm/{op}/{name}": value for name, value in zip(COMMUNICATION, values)}
    return found
