"""Composing a configuration: Hydra's schema and resolvers, and what is said of keys that cannot be."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterator
from typing import cast

import psutil
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from cpfold_train.config.check_bounds import keys_of
from cpfold_train.config.quoting import typed
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.world import started_by_slurm
from cpfold_train.errors import ConfigError
from cpfold_train.paths import DATA

_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.+)'$", re.M)
"""What Hydra says of a value that it would read as several."""
_LISTS = ("data.train", "data.val")
"""Keys that list paths."""


def register() -> None:
    """Tell Hydra the schema and the resolvers that ``conf`` uses."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("example_data", lambda: str(DATA), use_cache=True, replace=True)


def typed_config(config: DictConfig) -> TrainConfig:
    """A composed configuration with the schema's types.

    Raises:
        ConfigError: it has keys that the schema does not have.
    """
    if added := next(_added(config, OmegaConf.structured(TrainConfig)), None):
        raise ConfigError(f"there is no key {added}: conf/train.yaml lists them all")
    return cast(TrainConfig, OmegaConf.to_object(config))


def run_stamp() -> str:
    """Name of the run directory, the same on every rank: DATE/TIME, or the number of the job's step under srun.

    The ranks that torchrun starts compose their configurations seconds apart; what they share is their parent. A job
    that SLURM puts back into the queue keeps its number, and so its run directory.
    """
    if started_by_slurm() and "SLURM_STEP_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    started = psutil.Process(os.getppid()).create_time() if "TORCHELASTIC_RUN_ID" in os.environ else time.time()
    return time.strftime("%Y-%m-%d/%H-%M-%S", time.localtime(started))


def explain(error: Exception) -> str:
    """One sentence on an error of Hydra or OmegaConf."""
    text = str(error)
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        schema = OmegaConf.structured(TrainConfig)
        if key in list(all_keys(schema)):
            # Hydra adds to a mapping that a recipe has made, and only what it knows.
            return f"{key} has other keys already: type {key}=null before it to replace them"
        near = difflib.get_close_matches(key, list(all_keys(schema)), n=1, cutoff=0.5)
        return f"there is no key {key}: " + (f"did you mean {near[0]}?" if near else "conf/train.yaml lists them all")
    ambiguous = _AMBIGUOUS.search(text)
    override = ambiguous[1] if ambiguous else getattr(error, "override", None)
    if override is not None and not re.match(r"[^=]*=[\[{].*{|[^=]*={", override):
        return _explain_value(override)
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines()]
    told = [line for line in lines if line and not line.startswith(("object_type", "reference_type", "provider="))]
    sentence = " ".join(told).replace("full_key: ", "in ").replace(" Config search path:", "")
    return f"{sentence}{_what_to_type(sentence)}" if isinstance(cause, ValidationError) else sentence


def _what_to_type(sentence: str) -> str:
    """After a sentence on a value of the wrong type, which ends with the key."""
    key = sentence.rpartition(" in ")[2]
    bounds = {name: bounds for name, _, bounds in keys_of(TrainConfig())}.get(key)
    if bounds is not None:
        return f": type {bounds.type.replace('KEY', key)}"
    return f": type {key}=true or {key}=false" if "bool" in sentence else ""


def _explain_value(override: str) -> str:
    """One sentence on ``KEY=VALUE`` that Hydra cannot read, or would read as several values."""
    key, equals, value = override.partition("=")
    if not value:
        return f"{key} has no value: type {key}=VALUE" if not equals else f"{override} has no key: type KEY={value}"
    if key in _LISTS and value[0] not in "[{":
        value = f"[{value}]"
    return (
        f"{override} is not one value as Hydra reads it, for which =, commas, brackets and quotes have a meaning of "
        f"their own: type {typed(key, value)}"
    )


def _added(node: DictConfig, schema: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys of ``node`` that the schema does not have; what lies in one of any type, such as ``data.crop``, is free."""
    for key in map(str, node):
        if key not in list(schema):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_missing(schema, key) and OmegaConf.is_dict(schema[key]):
            yield from _added(node[key], schema[key], f"{prefix}{key}.")


def all_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Names of all keys of a schema, those that have others below them too."""
    for key in map(str, node):
        yield prefix + key
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from all_keys(node[key], f"{prefix}{key}.")
