"""What can be found wrong with how many batches are trained and validated, once it is known how many there are."""

from __future__ import annotations

from cpfold_train.config.schema import TrainConfig, TrainerConfig
from cpfold_train.errors import ConfigError


def check_batches(config: TrainConfig, training: int, validation: int, dp: int) -> None:
    """Raise ConfigError where nothing would be trained or validated, or no epoch is as long as what is between two
    validations.

    Args:
        config: within its bounds.
        training: samples of an epoch, before ``data.samples_per_epoch``.
        validation: samples of the validation set, 0 where there is none.
        dp: replicas.
    """
    trainer = config.trainer
    _interval(trainer)
    if trainer.fast_dev_run:
        # It has limits of its own.
        return
    samples = training if config.data.samples_per_epoch is None else config.data.samples_per_epoch
    in_epoch = _limited("limit_train_batches", trainer.limit_train_batches, _batches(samples, config, dp))
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if validation and trainer.limit_val_batches != 0:
        _limited("limit_val_batches", trainer.limit_val_batches, _batches(validation, config, dp))
    if type(interval) is int and every is not None and interval > in_epoch and trainer.limit_val_batches != 0:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is more than the {in_epoch} batches of an epoch, by which "
            f"trainer.check_val_every_n_epoch={every} counts: type trainer.val_check_interval=1.0 for a validation at "
            f"the end of each, or trainer.check_val_every_n_epoch=null to count batches across epochs"
        )


def _interval(trainer: TrainerConfig) -> None:
    """Raise ConfigError for a part of an epoch between validations where batches are counted across epochs."""
    interval = trainer.val_check_interval
    if type(interval) is not int and trainer.check_val_every_n_epoch is None:
        shown = "null" if interval is None else interval
        raise ConfigError(
            f"trainer.val_check_interval={shown} is a part of an epoch, and batches are counted across epochs: type "
            "trainer.check_val_every_n_epoch=1, or a whole number of batches"
        )


def _batches(samples: int, config: TrainConfig, dp: int) -> int:
    return -(-samples // (dp * config.batch_size))


def _limited(name: str, limit: int | float | None, batches: int) -> int:
    """So many of the batches as ``trainer.NAME`` leaves."""
    if limit is None:
        return batches
    if isinstance(limit, int):
        return min(limit, batches)
    if not int(limit * batches):
        raise ConfigError(
            f"trainer.{name}={limit} of {batches} batches is less than one: type a larger fraction, or a whole number"
        )
    return int(limit * batches)
