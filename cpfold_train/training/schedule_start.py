"""Where in its schedule of learning rates a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.checkpoints.boltz import read_checkpoint
from cpfold_train.config.schema import TrainConfig


def schedule_start(config: TrainConfig, run_dir: Path) -> int | None:
    """The step of the schedule to start at; None: at 0, or where the checkpoint that the run resumes from stopped.

    ``optim.start_step`` says where a run starts. One that resumes from a checkpoint in its own directory has started
    already and goes on, so that the command of an interrupted run can be repeated.
    """
    start = config.optim.start_step
    if config.ckpt_path is not None and Path(config.ckpt_path).resolve().is_relative_to(run_dir.resolve()):
        return None
    if start == "checkpoint":
        # Together with ckpt_path, model.init_from is where that run began.
        return None if config.ckpt_path else _position_in_schedule(read_checkpoint(Path(config.model.init_from)))
    return start


def _position_in_schedule(checkpoint: dict[str, Any]) -> int:
    """Where in its schedule the run was that wrote a checkpoint; where nothing says so, how many steps it had made."""
    schedules = checkpoint.get("lr_schedulers") or [{}]
    return schedules[0].get("last_epoch", checkpoint.get("global_step", 0))


class StartSchedule(Callback):
    """Starts the schedule at a given step, with the settings of this run where the optimizer is a checkpoint's.

    Adam's moments stay. The scheduler's own count is the position in the schedule, so later checkpoints resume from it.

    Args:
        step: from 0 on.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._settings: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is new; a checkpoint's is loaded after this."""
        (optimizer,) = trainer.optimizers
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        schedule = config.scheduler
        schedule.last_epoch = self._step
        schedule.base_lrs = [settings["initial_lr"] for settings in self._settings]
        for group, settings, factor in zip(optimizer.param_groups, self._settings, schedule.lr_lambdas):
            group.update(settings, lr=settings["initial_lr"] * factor(self._step))
