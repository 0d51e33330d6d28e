"""What can be found wrong with the fine-tuning keys; patterns are looked up when there is a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.reports.metrics import METRICS, VALIDATION


def check_finetune(config: TrainConfig) -> None:
    """Raise ConfigError, one sentence that says what to type instead."""
    _groups(config.finetune.lr_groups)
    _start_step(config)
    _early_stop(config)


def _groups(groups: Any) -> None:
    """The schema cannot: Hydra sets no new key in one."""
    if groups is None:
        return
    factors: Iterable[tuple[Any, Any]] = groups.items() if isinstance(groups, dict) else [(groups, None)]
    if not all(isinstance(name, str) and type(f) in (int, float) and f > 0 for name, f in factors):
        raise ConfigError(
            f"finetune.lr_groups={groups} does not map patterns to factors above 0: type for example "
            "finetune.lr_groups={structure_module: 0.1}, and finetune.freeze for what is not to be trained"
        )


def _start_step(config: TrainConfig) -> None:
    start = config.optim.start_step
    if start is None or (isinstance(start, int) and not isinstance(start, bool) and start >= 0):
        return
    if start != "checkpoint":
        raise ConfigError(f"optim.start_step={start} is no step: type a whole number from 0 on, checkpoint, or null")
    if config.model.init_from is None:
        raise ConfigError(
            "optim.start_step=checkpoint takes the step of the checkpoint in model.init_from: type that too, or leave "
            "optim.start_step out, and a run that resumes from ckpt_path goes on where that stopped"
        )


def _early_stop(config: TrainConfig) -> None:
    monitor, steps = config.early_stop.monitor, config.diffusion.validation_steps
    if monitor is None:
        return
    if monitor not in VALIDATION:
        raise ConfigError(
            f"early_stop.monitor={monitor} is not supported: type one of {', '.join(VALIDATION)}, or null"
        )
    if not config.data.val or config.trainer.limit_val_batches == 0:
        raise ConfigError(
            f"early_stop.monitor={monitor} needs validation: type data.val=[...] or early_stop.monitor=null"
        )
    if METRICS[monitor].needs and not steps:
        raise ConfigError(f"early_stop.monitor={monitor} needs sampled structures: type diffusion.validation_steps=20")
    require_metric(monitor, config.loss.of_confidence)


def require_metric(monitor: str | None, trains_confidence: bool) -> None:
    """Raise ConfigError where a metric of the confidence module is watched, and the module has no loss or is frozen.

    Args:
        monitor: the metric.
        trains_confidence: whether the confidence module is trained.
    """
    if monitor is not None and METRICS[monitor].needs == "confidence" and not trains_confidence:
        raise ConfigError(
            f"early_stop.monitor={monitor} is of the confidence module, which is not trained: type loss.plddt=1e-4 "
            "loss.resolved=1e-4 loss.pde=1e-4 loss.pae=1e-4 and do not freeze it, or watch val/loss"
        )
