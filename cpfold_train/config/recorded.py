"""Going on with a run by its own configuration: what its directory records, and what is typed beside it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cpfold_train.checkpoints.boltz import read_checkpoint
from cpfold_train.checkpoints.sharded import INDEX, is_sharded_checkpoint, read_index
from cpfold_train.config.quoting import typed as typed_key
from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.reports.record import RESOLVED, flattened
from cpfold_train.whole_file import whole_file

DECIDE_MEMORY = ("cp.grid", "crop_size", "data.crop_schedule", "kernels", "memory", "model", "trainer.accelerator")
"""What the options of memory depend on that a run decides by size: with another value they are decided again."""
NOT_OF_A_RUN = ("resume", "config_from", "ckpt_path")
"""Keys that say where a start goes on from, and nothing of how it trains."""


def with_record(config: DictConfig, typed: Iterable[str]) -> DictConfig:
    """The configuration that ``resume`` or ``config_from`` asks for: the recorded one, and over it what is typed.

    Args:
        config: as Hydra has composed it from the defaults and what is typed.
        typed: the overrides, as typed.

    Returns:
        ``config`` itself where neither key is set. With ``resume``, ``ckpt_path`` is the newest complete checkpoint,
        unless one is typed.

    Raises:
        ConfigError: there is no such record, it is of another version, or an override has no meaning beside it.
    """
    if not (config.resume or config.config_from):
        return config
    run_dir = Path(config.resume) if config.resume else None
    if run_dir is not None and config.config_from:
        raise ConfigError("resume has a configuration of its own: leave config_from out, or type ckpt_path with it")
    path = run_dir / RESOLVED if run_dir else Path(config.config_from)
    recorded = _read(path)
    keys = [_key(override) for override in typed]
    both = deepcopy(config)
    OmegaConf.set_struct(both, False)
    _put(both, recorded, OmegaConf.structured(TrainConfig), path)
    if any(key.startswith(DECIDE_MEMORY) for key in keys):
        both.memory.offload = both.memory.keep_attention = None
    for key in keys:
        OmegaConf.update(both, key, OmegaConf.select(config, key), merge=False)
    if run_dir is not None and "ckpt_path" not in keys:
        both.ckpt_path = str(newest_checkpoint(run_dir))
    elif "ckpt_path" not in keys:
        both.ckpt_path = None
    both.resume = both.config_from = None
    return both


def recorded_nodes(words: Iterable[str]) -> str:
    """``trainer.num_nodes`` of the record that the words of a command line name; 1 where they name none."""
    values = dict(word.split("=", 1) for word in words if word.startswith(("resume=", "config_from=")))
    path = Path(values["resume"].strip("'\""), RESOLVED) if "resume" in values else Path(values.get("config_from", ""))
    try:
        return str(OmegaConf.select(_read(path), "trainer.num_nodes", default=1))
    except ConfigError:
        # It is told when the configuration is composed.
        return "1"


def newest_checkpoint(run_dir: Path) -> Path:
    """The complete checkpoint of a run that was written last: one with more steps may be of a course that the run has
    left, for an earlier checkpoint.

    Raises:
        ConfigError: there is none.
    """
    folder = run_dir / "checkpoints"
    found = {path: step for path in sorted(folder.glob("*.ckpt*")) if (step := step_of(path)) is not None}
    if not found:
        again = typed_key("config_from", str(run_dir / RESOLVED))
        raise ConfigError(
            f"{run_dir} has no complete checkpoint to go on from: {again} starts its configuration again, in a new "
            "directory"
        )
    newest = found[max(found, key=_written)]
    # Of as many steps, the one that does not depend on what was the best.
    return max((path for path in found if found[path] == newest), key=lambda path: path.name.startswith("last"))


def _written(path: Path) -> int:
    return (path / INDEX if path.is_dir() else path).stat().st_mtime_ns


def damaged_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that are not complete, as a full disk or a machine that fails leaves them."""
    return [path for path in sorted((run_dir / "checkpoints").glob("*.ckpt*")) if step_of(path) is None]


def step_of(path: Path) -> int | None:
    """Optimizer steps of a checkpoint, a file or that of a run with FSDP; None where it is not complete."""
    try:
        if path.is_dir():
            return read_index(path)["global_step"] if is_sharded_checkpoint(path) else None
        # The table of contents is at the end of the file.
        return read_checkpoint(path)["global_step"] if zipfile.is_zipfile(path) else None
    except (ConfigError, OSError, KeyError, RuntimeError):
        return None


def recorded_beside(ckpt_path: str | None) -> dict[str, Any] | None:
    """The flat configuration of the run that a checkpoint lies in, if it is there."""
    if ckpt_path is None:
        return None
    path = run_of(Path(ckpt_path)) / RESOLVED
    return flattened(OmegaConf.to_container(_read(path), resolve=True)) if path.exists() else None


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that has written a checkpoint, if it is still where that run has put it."""
    return checkpoint.absolute().parent.parent


def differences(recorded: dict[str, Any], config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values a start changes, with the recorded value and that of now."""
    now = flattened(OmegaConf.to_container(config, resolve=True))
    schema = flattened(OmegaConf.to_container(OmegaConf.structured(TrainConfig)))
    # A key of the schema that the record does not have is newer than the record.
    left_out = {*NOT_OF_A_RUN, *(schema.keys() - recorded.keys())}
    names = [name for name in dict.fromkeys([*recorded, *now]) if name not in left_out]
    pairs = {name: (recorded.get(name, "absent"), now.get(name, "absent")) for name in names}
    return {name: (was, is_now) for name, (was, is_now) in pairs.items() if was != is_now}


def write_record(record: dict[str, Any], run_dir: Path) -> None:
    """Write the configuration of a start; that of an earlier start of the run is kept beside it."""
    path = run_dir / RESOLVED
    text = OmegaConf.to_yaml(record)
    if path.exists() and path.read_text() != text:
        numbered = (run_dir / f"resolved.{number}.yaml" for number in count(1))
        shutil.copy2(path, next(kept for kept in numbered if not kept.exists()))
    with whole_file(path) as file:
        file.write(text)


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: type the directory of a run, such as resume=runs/DATE/TIME")
    try:
        recorded = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(recorded, DictConfig):
        raise ConfigError(f"{path} holds no configuration: type the resolved.yaml of a run")
    return recorded


def _key(override: str) -> str:
    """The key of an override; the groups ``optim=af3`` and ``model=boltz2`` are keys, too."""
    key = override.partition("=")[0].lstrip("+")
    if key == "recipe" or override.startswith("~"):
        raise ConfigError(
            f"{override} has no meaning beside the configuration of a run: type the keys that are to change"
        )
    return key.partition("@")[0]


def _put(config: DictConfig, recorded: DictConfig, schema: DictConfig, path: Path, prefix: str = "") -> None:
    """Set the recorded values; what lies in a key of any type, such as ``data.crop``, as a whole."""
    for key in map(str, recorded):
        if key not in list(schema):
            raise ConfigError(f"{path} has {prefix}{key}, which is no key of this version: take it out of the file")
        if not OmegaConf.is_missing(schema, key) and OmegaConf.is_dict(schema[key]):
            _put(config[key], recorded[key], schema[key], path, f"{prefix}{key}.")
        else:
            config[key] = recorded[key]
