"""The end of a run: what ``result.json`` says."""

from __future__ import annotations

import time
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.errors import DiskFullError
from cpfold_train.faults.skip import SkipBadSteps
from cpfold_train.memory import now_mib, peak_mib, reset_peak
from cpfold_train.parallel.gather import gather_numbers
from cpfold_train.reports.metrics import PER_RANK, VALIDATION
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.result_file import write_result
from cpfold_train.training.reporting.step_metrics import StepMetrics


class Result(Callback):
    """Writes the result at the end, whether good or bad, and measures memory from the first step on.

    Lists hold one number per rank: ``peak_memory_mib``, the same above what the process used before the first step,
    ``sent_mib``, ``exposed_comm_s`` and ``data_wait_s`` of the whole run, and ``data_wait_share``, what part the last
    one is of the time spent on training steps. ``quarantined`` counts the samples that could not be used, ``skipped``
    the steps.

    Args:
        run_dir: where ``metrics.csv`` is and the result goes.
        seed: for the record.
        skip: knows how many steps were skipped.
        steps: knows how long training steps took.
    """

    def __init__(self, run_dir: Path, seed: int, skip: SkipBadSteps, steps: StepMetrics) -> None:
        self._skip, self._steps = skip, steps
        self._run_dir = run_dir
        self._seed = seed
        self._started = time.time()
        self._per_rank: dict[str, list[float]] = {}
        self._quarantined = 0
        self._worked = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights, optimizer and gradient buckets are in place; activations are not."""
        device = trainer.strategy.root_device
        reset_peak(device)
        self._baseline = now_mib(device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cp, waited = trainer.strategy.cp, trainer.train_dataloader.waited_s
        peak, total = peak_mib(trainer.strategy.root_device), cp.ledger.total()
        self._worked = self._steps.watch.seconds()
        of_this_rank = {
            "peak_memory_mib": peak,
            "peak_memory_above_baseline_mib": peak - self._baseline,
            "sent_mib": total.sent_bytes / 2**20,
            "exposed_comm_s": total.waited_s,
            "data_wait_s": waited,
            "data_wait_share": waited / max(waited + self._worked, 1e-9),
        }
        numbers = [*(of_this_rank[name] for name in PER_RANK), trainer.datamodule.quarantined]
        *columns, quarantined = gather_numbers(cp, numbers).T.tolist()
        self._per_rank = dict(zip(PER_RANK, columns))
        # All ranks of a replica count the same samples: one of them speaks for it.
        self._quarantined = round(sum(quarantined[:: cp.grid.cp_size]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, {"status": "completed"})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        status = "interrupted" if isinstance(exception, (KeyboardInterrupt, SystemExit)) else "failed"
        error = trainer.strategy.fault or f"{type(exception).__name__}: {exception}"
        # There may be no room for it. What is told then is why the run ended.
        with suppress(DiskFullError):
            self._write(trainer, pl_module, {"status": status, "error": error})

    def _write(self, trainer: Trainer, pl_module: LightningModule, outcome: dict[str, str]) -> None:
        if not trainer.is_global_zero:
            return
        grid = trainer.strategy.grid
        result = outcome | {
            "steps": trainer.global_step,
            **_last_metrics(self._run_dir / "metrics.csv"),
            "seconds": round(time.time() - self._started, 1),
            "grid": str(grid),
            "kernels": trainer.strategy.kernels.name,
            "dp": grid.dp,
            "world_size": grid.world_size,
            "seed": self._seed,
            "quarantined": self._quarantined,
            "skipped": self._skip.skipped,
            "left_out": pl_module.left_out,
            **self._per_rank,
        }
        write_result(self._run_dir, result)


def _last_metrics(path: Path) -> dict[str, Any]:
    """``last_losses`` of up to ten steps, and the last value of each validation metric."""
    rows = read_metrics(path)
    # A step whose loss is not a number was skipped.
    losses = [loss for row in rows if row["train/loss"] and isfinite(loss := float(row["train/loss"]))]
    validation = {name: float(row[name]) for row in rows for name in row if name in VALIDATION and row[name]}
    return {"train/loss": losses[-1] if losses else None, "last_losses": losses[-10:], **validation}
