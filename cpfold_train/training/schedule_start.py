"""Where in its schedule of learning rates a run starts, and whose settings its optimizer has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.checkpoints.boltz import read_checkpoint
from cpfold_train.config.schema import TrainConfig

_SETTINGS = "initial_lr", "factor", "betas", "eps", "weight_decay"
"""Of a group of parameters: what the configuration says. Everything else is the optimizer's own."""


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
    """Has the optimizer and its schedule follow the configuration, also where both come from a checkpoint.

    Lightning restores the peak rate, betas, eps and weight decay of then, and takes warm-up and decay of now. Here all
    of them are those of now, so that what is recorded as the configuration of a run is what its steps are made with.
    Adam's moments and the position in the schedule are the checkpoint's.

    Args:
        step: position in the schedule to start at, from 0 on; None for that of the checkpoint. The scheduler's own
            count is the position, so later checkpoints resume from it.
    """

    def __init__(self, step: int | None) -> None:
        self._step = step
        self._settings: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is new; a checkpoint's is loaded after this."""
        (optimizer,) = trainer.optimizers
        self._settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        schedule = config.scheduler
        if self._step is not None:
            schedule.last_epoch = self._step
        schedule.base_lrs = [settings["initial_lr"] for settings in self._settings]
        for group, settings, factor in zip(optimizer.param_groups, self._settings, schedule.lr_lambdas):
            group.update(settings, lr=settings["initial_lr"] * factor(schedule.last_epoch))
