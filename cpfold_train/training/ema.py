"""The moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cpfold_train.parallel.sharding import own_part


class MovingAverage(Callback):
    """Exponential moving average of the trainable parameters: used in validation and kept in checkpoints.

    In a checkpoint ``state_dict`` holds the average, ready for use, and ``current_model_state`` the weights under
    training. The average is in fp32, or fp64 where the weights are, and sharded over the ranks if they are.

    Args:
        decay: limit of :func:`average_decay`.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        self._updates = 0
        self._latest_step = 0
        self._under_training: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The parameters are where they stay. A checkpoint has been read before, or is read after this."""
        self._average = _copies(pl_module, self._average)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The steps of a checkpoint are in its average, and in none that starts with its weights."""
        self._latest_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._latest_step:
            return
        self._latest_step = trainer.global_step
        weight = 1 - average_decay(self._updates, self._decay)
        self._updates += 1
        parameters = _trainable(pl_module)
        averages = [own_part(self._average[name]) for name in parameters]
        latest = [own_part(x).to(average.dtype) for x, average in zip(parameters.values(), averages)]
        torch._foreach_lerp_(averages, latest, weight)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the average."""
        parameters = _trainable(pl_module)
        self._under_training = {name: own_part(parameter).clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            own_part(parameter).copy_(own_part(self._average[name]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in _trainable(pl_module).items():
            own_part(parameter).copy_(self._under_training[name])
        self._under_training = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        first_name = {parameter: name for name, parameter in pl_module.named_parameters()}
        average = {
            name: self._average[first_name[parameter]]
            for name, parameter in pl_module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning has put ``state_dict`` in place. Without an average in the checkpoint, its weights start one."""
        self._average = _copies(pl_module, checkpoint["state_dict"])
        if "current_model_state" in checkpoint:
            self._updates = int(checkpoint["averaging_state"]["n_averaged"])
            pl_module.load_state_dict(checkpoint["current_model_state"])


def average_decay(updates: int, limit: float) -> float:
    """Decay at an update, counted from 0: ``min(limit, (1 + n) / (10 + n))``, so that the first, random weights are
    soon forgotten; the first update takes the weights as they are."""
    return min(limit, (1 + updates) / (10 + updates)) if updates else 0.0


def _trainable(module: LightningModule) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _copies(module: LightningModule, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A wide copy of each trainable parameter, or of the value given for it, beside the parameter."""
    return {
        name: values.get(name, parameter)
        .detach()
        .to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        .clone()
        for name, parameter in _trainable(module).items()
    }
