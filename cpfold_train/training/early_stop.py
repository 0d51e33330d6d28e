"""Ending a run whose validation no longer improves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from cpfold_train.reports.metrics import METRICS


class EarlyStop(EarlyStopping):
    """Ends the run after ``patience`` validations without improvement, or one that is not finite.

    The metrics of validation are equal on all ranks, and so is the decision. The count is part of checkpoints, and so a
    run that has ended like this and is started again makes no step, unless it is given more patience.

    Args:
        monitor: a metric of validation.
        patience: validations in a row.
        min_delta: a smaller improvement is none.

    Attributes:
        ended_before: why no step is made; None where the run goes on.
    """

    ended_before: str | None = None

    def __init__(self, monitor: str, patience: int, min_delta: float) -> None:
        mode = METRICS[monitor].better
        # A validation may have no pair for its metric.
        super().__init__(monitor, min_delta, patience, mode=mode, strict=False, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The count of a checkpoint, and the patience that is typed now."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Why the run that wrote the checkpoint has ended.
        reason, self.stopping_reason_message = self.stopping_reason_message, None
        not_finite = self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC
        if reason is None or (self.wait_count < self.patience and not not_finite):
            return
        if not_finite:
            why = "was not finite: type early_stop.monitor=null to go on"
        else:
            why = (
                f"did not improve in {self.wait_count} validations: type a larger early_stop.patience than "
                f"{self.patience}, or early_stop.monitor=null, to go on"
            )
        self.ended_before = f"no step was made: early stop had ended this run, because {self.monitor} {why}"
        trainer.should_stop = True

    def reason(self, step: int) -> str:
        """Why the run ends, or has ended before; empty where it is not for this. ``step`` is the last one."""
        if self.ended_before:
            return self.ended_before
        return f"stopped at step {step}: {self.stopping_reason_message}" if self.stopping_reason_message else ""
