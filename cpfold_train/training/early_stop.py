"""Ending a run whose validation no longer improves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from cpfold_train.reports.metrics import METRICS


class EarlyStop(EarlyStopping):
    """Ends the run after ``patience`` validations without improvement, or one that is not finite, and says so.

    The metrics of validation are equal on all ranks, and so is the decision. The count is part of checkpoints.

    Args:
        monitor: a metric of validation.
        patience: validations in a row.
        min_delta: a smaller improvement is none.
    """

    def __init__(self, monitor: str, patience: int, min_delta: float) -> None:
        super().__init__(monitor, min_delta, patience, mode=METRICS[monitor].better, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The count of a checkpoint, and the patience that is typed now."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # That of a checkpoint is why an earlier run ended.
        self.stopping_reason_message = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopping_reason_message and trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}: {self.stopping_reason_message}")
