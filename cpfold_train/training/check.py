"""What can be found wrong with a configuration before anything is started."""

from __future__ import annotations

from pathlib import Path

from cpfold_train.data.shards import open_shards
from cpfold_train.errors import ConfigError
from cpfold_train.training.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Raise ConfigError or DataError, one sentence that says what to type instead."""
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={config.ckpt_path} does not exist: type the path of a .ckpt file or leave it out")
    for name, value in (("crop_size", config.crop_size), ("batch_size", config.batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small: type {name}=1 or more")
    if config.cp.timeout_s <= 0:
        raise ConfigError(f"cp.timeout_s={config.cp.timeout_s} leaves no time: type a number of seconds above 0")
    open_shards(config.data.train)
    if config.data.val:
        open_shards(config.data.val)
    if config.wandb.enabled:
        from cpfold_train.training.dashboard import require_wandb

        require_wandb()
