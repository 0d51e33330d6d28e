"""The figures of each step: measured on every rank, combined, sent to the loggers and the progress bar."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from cpfold_train.memory import peak_mib
from cpfold_train.parallel.gather import gather_figures
from cpfold_train.training.optim import base_rate
from cpfold_train.training.skip import SkipBadSteps


class StepFigures(Callback):
    """One row of figures every ``log_every_n_steps`` optimizer steps, and the validation's figures beside it.

    Losses are summed over the grid and averaged over the replicas, so a curve does not depend on the grid. Tokens are
    those of all replicas. ``data_wait_s`` is what the rank that waited longest for data waited within the step,
    ``quarantined`` how many samples could not be used since the start. Memory is that of the fullest rank since the
    start; bytes sent and exposed communication are means over ranks within the step.

    Args:
        skip: knows how many steps were skipped since the start.
    """

    def __init__(self, skip: SkipBadSteps) -> None:
        self._skip = skip
        self._in_validation = torch.zeros(2, dtype=torch.float64)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_step(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._due(trainer, trainer.global_step + 1):
            self._lr = base_rate(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._batches.append((outputs["shares"], outputs["tokens"]))
        self._worked += time.perf_counter() - self._started
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
        self._step, self._batches, self._worked = trainer.global_step, [], 0.0
        self._waited_before = trainer.train_dataloader.waited_s
        if self._due(trainer, self._step + 1):
            # On GPUs asking waits for what is under way.
            self._before_step = self._communicated(trainer)

    def _communicated(self, trainer: Trainer) -> Tensor:
        """(2,): MiB that this rank has sent, and seconds it has waited, in training since the start."""
        total = trainer.strategy.cp.ledger.total()
        return torch.tensor([total.sent_bytes / 2**20, total.waited_s], dtype=torch.float64) - self._in_validation

    @staticmethod
    def _due(trainer: Trainer, step: int) -> bool:
        return step % trainer.log_every_n_steps == 0

    def _log_step(self, trainer: Trainer, crop_size: int) -> None:
        cp = trainer.strategy.cp
        shares, tokens = zip(*self._batches)
        losses = {f"train/{name}": torch.stack([share[name] for share in shares]).double() for name in shares[0]}
        figures = gather_figures(
            cp,
            [
                torch.stack(tokens).sum().item() / cp.grid.cp_size,
                self._worked,
                trainer.train_dataloader.waited_s - self._waited_before,
                trainer.datamodule.quarantined / cp.grid.cp_size,
                peak_mib(trainer.strategy.root_device),
                *(self._communicated(trainer) - self._before_step).tolist(),
                *(loss.mean().item() for loss in losses.values()),
            ],
        )
        total, mean, highest = figures.sum(0).tolist(), figures.mean(0).tolist(), figures.amax(0).tolist()
        row = {
            **{name: value / cp.grid.dp for name, value in zip(losses, total[7:])},
            "lr": self._lr,
            "grad_norm": self._skip.grad_norm.item(),
            "tokens": round(total[0]),
            "crop_size": crop_size,
            "step_s": mean[1],
            "data_wait_s": highest[2],
            "quarantined": round(total[3]),
            "skipped": self._skip.skipped,
            "peak_memory_mib": highest[4],
            "sent_mib": mean[5],
            "exposed_comm_s": mean[6],
        }
        for logger in trainer.loggers:
            logger.log_metrics(row | _by_op(trainer), step=trainer.global_step)
        shown = {"loss": "train/loss", "tokens": "tokens", "s/step": "step_s", "MiB": "peak_memory_mib"}
        shown |= {"comm_s": "exposed_comm_s", "data_s": "data_wait_s"}
        self.log_dict({name: float(row[key]) for name, key in shown.items()}, prog_bar=True, logger=False)


def _by_op(trainer: Trainer) -> dict[str, float]:
    """What this rank has sent and waited for since the start, by operation."""
    figures = {}
    for op, entry in trainer.strategy.cp.ledger.by_op().items():
        figures[f"comm/{op}/sent_mib"] = entry.sent_bytes / 2**20
        figures[f"comm/{op}/exposed_s"] = entry.waited_s
    return figures
