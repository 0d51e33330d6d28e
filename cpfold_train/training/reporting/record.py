"""The configuration of a run, in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.config.recorded import write_record


class WriteRecord(Callback):
    """Writes the configuration once the checkpoint has been read that the run goes on from: one that does not fit the
    checkpoint is refused before, and must not be what the next start goes on with.

    Args:
        record: the configuration as plain containers.
        run_dir: of the run.
    """

    def __init__(self, record: dict[str, Any], run_dir: Path) -> None:
        self._record, self._run_dir = record, run_dir

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_record(self._record, self._run_dir)
