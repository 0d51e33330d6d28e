"""The data sets of a run, from what the user typed under ``data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpfold_train.config.schema import DataConfig
from cpfold_train.data.stream.crop import CROPS
from cpfold_train.data.stream.sampling import SAMPLINGS, Source
from cpfold_train.errors import ConfigError

KEYS = ("shards", "weight", "sampling", "crop")


def training_sources(data: DataConfig) -> list[Source]:
    """One set where ``data.train`` lists shards, else one for each of its entries.

    Raises:
        ConfigError: one sentence that says what to type instead.
    """
    if not data.train:
        raise ConfigError("data.train is empty: type data.train=[SHARDS], for example data.train=[my/shards/*.tar]")
    if all(isinstance(entry, str) for entry in data.train):
        return [_source({"shards": data.train}, data, "data.train")]
    return [_source(entry, data, f"data.train[{i}]") for i, entry in enumerate(data.train)]


def validation_source(data: DataConfig) -> Source:
    """The validation set: each sample, in the crops of ``data.crop``."""
    return _source({"shards": data.val, "sampling": "each"}, data, "data.val")


def _source(given: Any, data: DataConfig, name: str) -> Source:
    if not isinstance(given, Mapping) or not given.get("shards"):
        raise ConfigError(f"{name}={given} is not a data set: type {{shards: [my/shards/*.tar], weight: 0.5}}")
    if unknown := sorted(set(given) - set(KEYS)):
        raise ConfigError(f"{name} has a key {unknown[0]}: type only {', '.join(KEYS)}")
    shards = [given["shards"]] if isinstance(given["shards"], str) else given["shards"]
    if not isinstance(shards, Sequence) or not all(isinstance(pattern, str) for pattern in shards):
        raise ConfigError(f"{name}={given['shards']} does not list shards: type their paths, as [my/shards/*.tar]")
    weight, sampling = given.get("weight", 1.0), given.get("sampling", data.sampling)
    if not _positive(weight):
        raise ConfigError(f"{name}.weight={weight} is not a number above 0: type for example weight: 0.5")
    if sampling not in SAMPLINGS:
        raise ConfigError(
            f"data.sampling={sampling} is not supported: type data.sampling=" + " or data.sampling=".join(SAMPLINGS)
        )
    return Source(list(shards), float(weight), sampling, crop_kinds(given.get("crop", data.crop)))


def crop_kinds(crop: Any) -> dict[str, float]:
    """Relative probability of each kind of crop, from one kind or from a mapping of such."""
    kinds = {crop: 1.0} if isinstance(crop, str) else crop
    if not isinstance(kinds, Mapping) or not set(kinds) <= set(CROPS):
        raise ConfigError(f"data.crop={crop} is not supported: type data.crop=" + " or data.crop=".join(CROPS))
    drawn = {kind: float(weight) for kind, weight in kinds.items() if _positive(weight)}
    if not drawn or any(not _positive(weight) and weight != 0 for weight in kinds.values()):
        raise ConfigError(f"data.crop={crop} has no proper weights: type for example data.crop={{{CROPS[0]}: 0.5}}")
    return drawn


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
