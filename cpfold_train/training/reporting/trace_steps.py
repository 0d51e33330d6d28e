"""``profile.steps``: what host and device do in a few steps, one trace a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile


class TraceSteps(Callback):
    """Writes ``profile/rank0.json.gz`` and so on, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

    A trace of a large step has millions of events: two or three steps are enough. The first steps of a run are slower
    than the others.

    Args:
        folder: receives the files.
        first, last: optimizer steps to trace, both included, as ``metrics.csv`` counts them.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self._profile is None and self._first <= trainer.global_step + 1 <= self._last:
            on_gpu = trainer.strategy.root_device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if trainer.global_step >= self._last:
            self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _end(self, trainer: Trainer) -> None:
        if self._profile is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank{trainer.global_rank}.json.gz"))
        self._profile = None
