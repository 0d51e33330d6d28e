"""Going on with a run by its own configuration: what its directory records, and what is typed beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from cpfold_train.checkpoints.boltz import read_checkpoint
from cpfold_train.checkpoints.damage import UNREADABLE, is_undamaged
from cpfold_train.checkpoints.sharded import INDEX, is_sharded_checkpoint, read_index
from cpfold_train.config.quoting import typed as typed_key
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.world import is_first_rank, started_by_rank_0
from cpfold_train.errors import ConfigError
from cpfold_train.reports.record import RESOLVED, flattened
from cpfold_train.whole_file import whole_file

DECIDE_MEMORY = ("cp.grid", "crop_size", "data.crop_schedule", "kernels", "memory", "model", "trainer.accelerator")
"""What the options of memory depend on that a run decides by size: with another value they are decided again."""
CHOSEN_CHECKPOINT = "CPFOLD_TRAIN_CHECKPOINT"
"""Variable of the environment with the checkpoint that ``resume`` has come to, for ranks that this process starts."""
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
        # All of it is read: once for the ranks that this process starts, which take its choice.
        if not started_by_rank_0():
            os.environ[CHOSEN_CHECKPOINT] = str(newest_checkpoint(run_dir))
        both.ckpt_path = os.environ[CHOSEN_CHECKPOINT]
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
    """The checkpoint of a run that was written last, among those that are complete and undamaged. One with more steps
    may be of a course that the run has left, for an earlier checkpoint.

    Raises:
        ConfigError: there is none.
    """
    steps = {path: step for path, step in _steps(run_dir).items() if step is not None}
    written = {made: max(_written(path) for path, step in steps.items() if step == made) for made in steps.values()}
    # Of as many steps the last, which does not depend on what was the best.
    found = sorted(steps, key=lambda path: (written[steps[path]], path.name.startswith("last")), reverse=True)
    reading = Console(stderr=True).status(f"reading the newest checkpoint of {run_dir}")
    with reading if is_first_rank() else nullcontext():
        newest = next(filter(is_undamaged, found), None)
    if newest is None:
        again = typed_key("config_from", str(run_dir / RESOLVED))
        raise ConfigError(
            f"{run_dir} has no complete checkpoint to go on from: {again} starts its configuration again, in a new "
            "directory"
        )
    return newest


def damaged_checkpoints(run_dir: Path, step: int = -1) -> list[Path]:
    """Checkpoints of a run that are not complete, as a full disk or a machine that fails leaves them; and those of a
    later step that are damaged within."""
    steps = _steps(run_dir)
    return [path for path, made in steps.items() if made is None or (made > step and not is_undamaged(path))]


def _written(path: Path) -> int:
    return (path / INDEX if path.is_dir() else path).stat().st_mtime_ns


def _steps(run_dir: Path) -> dict[Path, int | None]:
    return {path: step_of(path) for path in sorted((run_dir / "checkpoints").glob("*.ckpt*"))}


def step_of(path: Path) -> int | None:
    """Optimizer steps of a checkpoint, a file or that of a run with FSDP; None where it is not complete."""
    try:
        if path.is_dir():
            return read_index(path)["checkpoint"]["global_step"] if is_sharded_checkpoint(path) else None
        return read_checkpoint(path)["global_step"]
    except UNREADABLE:
        return None


def recorded_beside(ckpt_path: str | None) -> dict[str, Any] | None:
    """The flat configuration of the run that a checkpoint lies in, if it is there."""
    if ckpt_path is None:
        return None
    path = run_of(Path(ckpt_path)) / RESOLVED
    return _flat(_read(path)) if path.exists() else None


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that has written a checkpoint, if it is still where that run has put it."""
    return checkpoint.absolute().parent.parent


def differences(recorded: dict[str, Any], config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values a start changes, with the recorded value and that of now."""
    now = _flat(config)
    schema = flattened(OmegaConf.to_container(OmegaConf.structured(TrainConfig)))
    # A key of the schema that the record does not have is newer than the record.
    left_out = {*NOT_OF_A_RUN, *(schema.keys() - recorded.keys())}
    names = [name for name in dict.fromkeys([*recorded, *now]) if name not in left_out]
    pairs = {name: (recorded.get(name, "absent"), now.get(name, "absent")) for name in names}
    return {name: (was, is_now) for name, (was, is_now) in pairs.items() if was != is_now}


def write_record(record: dict[str, Any], run_dir: Path) -> None:
    """Write the configuration of a start, which holds from any directory; that of an earlier start of the run is kept
    beside it."""
    path = run_dir / RESOLVED
    text = OmegaConf.to_yaml(_absolute(OmegaConf.create(record)))
    if path.exists() and path.read_text() != text:
        numbered = (run_dir / f"resolved.{number}.yaml" for number in count(1))
        shutil.copy2(path, next(kept for kept in numbered if not kept.exists()))
    with whole_file(path) as file:
        file.write(text)


def _flat(config: DictConfig) -> dict[str, Any]:
    return flattened(OmegaConf.to_container(_absolute(config), resolve=True))


def _absolute(config: DictConfig) -> DictConfig:
    """A configuration with absolute paths of what is read from: another start may be typed elsewhere."""
    config = deepcopy(config)
    for key in ("data.train", "data.val", "model.init_from"):
        value = OmegaConf.select(config, key)
        if value is not None:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            OmegaConf.update(config, key, _absolute_paths(plain), merge=False)
    return config


def _absolute_paths(value: Any) -> Any:
    """A path, or paths in a list or under ``shards`` in a data set."""
    if isinstance(value, list):
        return [_absolute_paths(entry) for entry in value]
    if isinstance(value, dict):
        return value | ({"shards": _absolute_paths(value["shards"])} if "shards" in value else {})
    is_local = isinstance(value, str) and "://" not in value
    return str(Path(value).absolute()) if is_local else value


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
