"""Whether each key of a configuration is within the bounds that the schema gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from cpfold_train.bounds import Bounds
from cpfold_train.errors import ConfigError


def check_bounds(config: Any) -> None:
    """Raise ConfigError for the first key that is out of its bounds."""
    for key, value, bounds in keys_of(config):
        if bounds is not None and value is not None and not bounds.holds(value):
            raise ConfigError(bounds.refusal(key, value))


def keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds | None]]:
    """Each key of a configuration with its value and bounds, in the order of the schema."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from keys_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field.metadata.get("bounds")
