"""When the end of a run is told, and what of it only the trainer knows."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.sources import training_sources, validation_source
from cpfold_train.reports.ending import Ending, print_ending
from cpfold_train.reports.shell import shown
from cpfold_train.tables import make_console
from cpfold_train.training.early_stop import EarlyStop
from cpfold_train.training.max_time import MaxTime


class EndBlock(Callback):
    """Prints the end of a run that was completed, on the first rank; the last of the callbacks that print then.

    Args:
        config: of the run.
        run_dir: of the run.
    """

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._start: int | None = None
        """Step that this start has begun with; None where it made none."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        best = next((c.best_model_path for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), "")
        data, step = self._config.data, trainer.global_step
        sources = [validation_source(data)] if data.val else training_sources(data)
        ending = Ending(
            0 if self._start is None else step - self._start,
            " ".join(filter(None, (c.reason(step) for c in trainer.callbacks if isinstance(c, (EarlyStop, MaxTime))))),
            longer(trainer),
            Path(best) if best else None,
            [shown(Path(pattern)) for source in sources for pattern in source.shards],
        )
        print_ending(self._run_dir, ending, make_console())
        sys.stdout.flush()


def longer(trainer: Trainer) -> str:
    """The key with a limit twice as large as the one that has ended the run; empty where another reason did."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={2 * trainer.max_steps}" if trainer.max_steps else ""
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs={2 * trainer.max_epochs}"
    timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
    if timer is not None and timer.time_remaining() is not None and timer.time_remaining() <= 0:
        minutes, seconds = divmod(round(2 * (timer.time_remaining() + timer.time_elapsed())), 60)
        hours, minutes = divmod(minutes, 60)
        return f"trainer.max_time={hours // 24:02d}:{hours % 24:02d}:{minutes:02d}:{seconds:02d}"
    return ""
