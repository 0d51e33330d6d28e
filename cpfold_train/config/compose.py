"""What is typed after ``plan``: the keys of a run, and those of the plan itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cpfold_train.config.check import check, check_kernels
from cpfold_train.config.check_bounds import check_bounds
from cpfold_train.config.composition import explain, register, typed_config
from cpfold_train.config.recorded import with_record
from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid, parse_grid
from cpfold_train.paths import CONF

OWN_KEYS = {"device": "h100-80gb", "gpus": "256"}
"""Keys of a plan that a run does not have, and their defaults."""


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        config: of the run.
        device: name of the device.
        gpus: the most ranks that a proposal may take.
        dp: replicas of the grid.
        grid: the grid; None where one is to be proposed.
        choose: whether ``memory`` is the planner's to choose.
    """

    config: TrainConfig
    device: str
    gpus: int
    dp: int
    grid: Grid | None
    choose: bool


def read_request(settings: list[str]) -> Request:
    """The run and the plan that ``KEY=VALUE`` settings describe.

    ``device=NAME`` and ``gpus=N`` are the plan's own; all others are those of ``train.py``. A grid is one that is typed
    or set by a recipe; ``cp.grid=auto`` asks for proposals. The memory options are chosen where ``memory=auto``
    is typed, and in proposals where none of them is typed.

    Raises:
        ConfigError: they cannot be planned.
    """
    typed = of_run(settings)
    parts = (setting.partition("=") for setting in settings if setting not in typed)
    typed_of_plan = {key: value for key, _, value in parts}
    own = OWN_KEYS | typed_of_plan
    if not own["gpus"].isdigit() or not int(own["gpus"]):
        raise ConfigError(f"gpus={own['gpus']} is not a number of GPUs: type gpus=8, for example")
    config = compose(typed)
    dp = int(config.dp) if str(config.dp).isdigit() else 1
    asked = any(setting.startswith(("cp.grid=", "recipe=")) for setting in typed) and config.cp.grid != "auto"
    grid = Grid(*parse_grid(config.cp.grid), dp) if asked else None
    if grid is not None and "gpus" in typed_of_plan and grid.world_size > int(own["gpus"]):
        raise ConfigError(
            f"cp.grid={grid} with dp={dp} takes {grid.world_size} GPUs, more than gpus={own['gpus']}: type "
            f"cp.grid=auto for proposals on up to {own['gpus']}, or gpus={grid.world_size}"
        )
    untouched = not any(setting.startswith("memory") for setting in typed)
    return Request(
        config, own["device"], int(own["gpus"]), dp, grid, config.memory.auto or (untouched and grid is None)
    )


def of_run(settings: list[str]) -> list[str]:
    """The settings that ``train.py`` takes."""
    return [setting for setting in settings if setting.partition("=")[0] not in OWN_KEYS]


def compose(settings: list[str]) -> TrainConfig:
    """The configuration of ``python train.py SETTINGS`` with its largest crops. Checkpoints to start from need not be
    there, nor shards, GPUs and their kernels.

    Raises:
        ConfigError: in the words of ``train.py``.
    """
    config = compose_run(settings)
    config = replace(config, model=replace(config.model, init_from=None), ckpt_path=None)
    check_bounds(config)
    check_kernels(config)
    check(replace(config, kernels="torch", trainer=replace(config.trainer, accelerator="cpu")))
    return replace(config, trainer=replace(config.trainer, accelerator="cpu"), crop_size=config.largest_crop)


def compose_run(settings: list[str]) -> TrainConfig:
    """The configuration of ``python train.py SETTINGS``, unchecked.

    Raises:
        ConfigError: a key is not there, or its value has the wrong type.
    """
    register()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return typed_config(with_record(hydra.compose("train", settings), settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
