"""What to type to run what was planned, and the file that says the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

from cpfold_train.config.compose import of_run
from cpfold_train.config.composition import register
from cpfold_train.devices import find_device
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig
from cpfold_train.paths import CONF
from cpfold_train.plan.plan import Plan
from cpfold_train.whole_file import whole_file


def memory_settings(memory: MemoryConfig) -> list[str]:
    """What to type to get these memory options; nothing where all are the defaults."""
    plain = MemoryConfig()
    return [f"memory.{key}={_typed(value)}" for key, value in vars(memory).items() if value != getattr(plain, key)]


def settings_of(found: Plan, typed: list[str]) -> list[str]:
    """The settings of ``train.py`` that run a plan.

    Args:
        typed: what the plan was asked for with.
    """
    on_gpu = found.device != "cpu" and not any(setting.startswith("trainer.accelerator=") for setting in typed)
    chosen = ["trainer.accelerator=gpu"] if on_gpu else []
    chosen += [f"cp.grid={found.grid}", f"dp={found.grid.dp}", *memory_settings(found.config.memory)]
    replaced = {"memory", *(setting.partition("=")[0] for setting in chosen)}
    kept = [x for x in of_run(typed) if (key := x.partition("=")[0]) not in replaced and not key.startswith("memory.")]
    return [*kept, *chosen]


def command_of(found: Plan, typed: list[str]) -> str:
    """What to type in a shell: one machine starts its ranks itself, and several are told of each other."""
    ranks, per_node = found.grid.world_size, find_device(found.device, 1).per_node
    words = ["python", "train.py", *settings_of(found, typed)]
    if found.device != "cpu" and ranks > per_node:
        nodes = -(-ranks // per_node)
        launcher = f"torchrun --nnodes {nodes} --nproc-per-node {ranks // nodes} --node-rank RANK --master-addr HOST"
        words = [*launcher.split(), *words[1:]]
    return shlex.join(words)


def write_config(found: Plan, typed: list[str], file: Path) -> str:
    """Write the configuration of a plan: what differs from the defaults of ``train.py``.

    Returns:
        What to type to run it.

    Raises:
        ConfigError: the file cannot be written, or has no name that Hydra takes.
    """
    if file.suffix != ".yaml":
        raise ConfigError(f"--write {file} is no configuration for Hydra: type --write {file.with_suffix('.yaml')}")
    if (CONF / file.name).exists():
        raise ConfigError(f"--write {file} has the name of a configuration that is there: type another, as my-run.yaml")
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain, wanted = (
            OmegaConf.to_container(hydra.compose("train", settings)) for settings in ([], settings_of(found, typed))
        )
    command = shlex.join(["python", "train.py", "--config-dir", str(file.parent), "--config-name", file.stem])
    head = f"# {found.grid.world_size} of {found.device}, planned with: {shlex.join(of_run(typed))}\n# {command}\n"
    changed = {"defaults": ["train", "_self_"]} | _changed(plain, wanted)
    try:
        with whole_file(file) as text:
            text.write(head + yaml.safe_dump(changed, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"--write {file} cannot be written ({error.strerror}): type another file") from None
    return command


def _changed(plain: dict[Any, Any], wanted: dict[Any, Any]) -> dict[Any, Any]:
    """Keys whose values differ, with the mappings that they are in."""
    changed = {}
    for key, value in wanted.items():
        before = plain.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if below := _changed(before, value):
                changed[key] = below
        elif key not in plain or value != before:
            changed[key] = value
    return changed


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
