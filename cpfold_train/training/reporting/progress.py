"""How far a run is, while it runs: one bar over all its steps, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from rich.live import Live

from cpfold_train.processes import say
from cpfold_train.reports.course import course
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.progress import Progress, bar, line
from cpfold_train.training.reporting.step_metrics import StepMetrics

REFRESH = 0.1
"""Seconds between two drawings of the bar at least."""


def total_steps(trainer: Trainer, batches: float) -> int | None:
    """Optimizer steps of a whole run, those before a resume included; None where no number of steps ends it.

    Args:
        trainer: has the limits, as Lightning understands them.
        batches: of an epoch.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and isfinite(batches):
        limits.append(trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(limits, default=None)


class ShowProgress(Callback):
    """Keeps what is known of the progress; its subclasses show it, on the first rank.

    Args:
        metrics: has the last logged row, and comes before this among the callbacks.
        earlier: ``metrics.csv``, where a run that resumes finds its last validation.
    """

    def __init__(self, metrics: StepMetrics, earlier: Path) -> None:
        self._metrics, self._earlier = metrics, earlier
        self.progress = Progress()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.monotonic(), trainer.global_step
        self.progress.total = total_steps(trainer, trainer.num_training_batches)
        made = [row for row in read_metrics(self._earlier) if int(row["step"]) <= trainer.global_step]
        if self.progress.validation is None and (validated := course(made, "val/loss")):
            self.progress.validation, self.progress.validated_at = validated.last, validated.last_step
        self._timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
        self._update(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        made = trainer.global_step - self.progress.step
        if made and self.progress.step == self._begun[1]:
            # The first step is slower than the others: they are timed from its end.
            self._paced = time.monotonic(), trainer.global_step
        self._update(trainer)
        if made and trainer.is_global_zero and trainer.global_step % trainer.log_every_n_steps == 0:
            self.show_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.validation = pl_module.validation.get("val/loss", self.progress.validation)
        self.progress.validated_at = trainer.global_step

    def show_step(self) -> None:
        """A step was logged."""

    def _update(self, trainer: Trainer) -> None:
        progress = self.progress
        progress.step, progress.row = trainer.global_step, self._metrics.row
        parts, left = [], []
        if progress.total is not None:
            parts.append(progress.step / max(progress.total, 1))
            if (pace := self._pace(trainer.global_step)) is not None:
                left.append(pace * (progress.total - progress.step))
        if self._timer is not None and (remaining := self._timer.time_remaining()) is not None:
            elapsed = self._timer.time_elapsed()
            parts.append(elapsed / max(remaining + elapsed, 1e-9))
            left.append(max(remaining, 0.0))
        progress.part, progress.seconds_left = max(parts, default=None), min(left, default=None)

    def _pace(self, step: int) -> float | None:
        """Seconds a step, with all that lies between two; None before the first one."""
        if step == self._begun[1]:
            return None
        since, first = self._paced if step > self._paced[1] else self._begun
        return (time.monotonic() - since) / (step - first)


class Lines(ShowProgress):
    """A line for each log interval."""

    def show_step(self) -> None:
        say(line(self.progress), "stdout")


class Bar(ShowProgress):
    """A bar on the terminal, from the first validation to the end. What is printed meanwhile appears above it.

    It is drawn when something was done, and not by a thread: workers are forked from this process.
    """

    _live: Live | None = None
    _drawn = 0.0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.step = trainer.global_step
        self._start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start(trainer)
        self._draw()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self._draw()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.progress.validating = batch_idx + 1, int(sum(batches))
        self._draw()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.progress.validating = None
        self._draw(at_once=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(at_once=True)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _start(self, trainer: Trainer) -> None:
        if self._live is None and trainer.is_global_zero:
            # Messages are not broken into lines: commands in them could not be pasted.
            console = _WithCursor(soft_wrap=True)
            # What was redirected to a file stays there.
            self._live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self._live.start()

    def _draw(self, at_once: bool = False) -> None:
        if self._live is not None and (at_once or time.monotonic() - self._drawn > REFRESH):
            self._live.update(bar(self.progress, self._live.console.width), refresh=True)
            self._drawn = time.monotonic()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _WithCursor(Console):
    """A terminal whose cursor stays: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False
