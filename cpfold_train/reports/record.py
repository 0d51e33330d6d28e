"""What a run directory says of a run: its configuration, its metrics, its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cpfold_train.errors import DataError
from cpfold_train.reports.course import Course, course
from cpfold_train.reports.metrics import METRICS, VALIDATION
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.result_file import read_result

RESOLVED = "resolved.yaml"
"""In a run directory: the whole configuration of the last start. Those of earlier ones are ``resolved.1.yaml`` ..."""


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        folder: of the run.
        keys: its configuration, by full key; empty where there is no ``resolved.yaml``.
        rows: of ``metrics.csv``, as text.
        result: what ``result.json`` holds; empty where the run has not ended.
    """

    folder: Path
    keys: dict[str, Any]
    rows: list[dict[str, str]]
    result: dict[str, Any]

    @property
    def status(self) -> str:
        """How it ended."""
        return self.result.get("status", "not ended")

    @property
    def steps(self) -> int:
        """Of the last row."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def validation(self) -> dict[str, Course]:
        """The course of each metric of validation that was measured."""
        found = {name: course(self.rows, name) for name in VALIDATION}
        return {name: values for name, values in found.items() if values is not None}


def read_record(folder: Path) -> Record:
    """Read a run directory.

    Raises:
        DataError: it is none.
    """
    metrics = folder / "metrics.csv"
    if not metrics.exists():
        raise DataError(f"{folder} has no metrics.csv: name the directory of a run, such as runs/DATE/TIME")
    config = folder / RESOLVED
    keys = flattened(OmegaConf.to_container(OmegaConf.load(config))) if config.exists() else {}
    return Record(folder, keys, read_metrics(metrics), read_result(folder))


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by full key; an empty mapping is a value."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def changed_keys(runs: Sequence[Record]) -> dict[str, list[Any]]:
    """Keys that do not have the same value in all runs, and the value of each; ``absent`` where a run has no such key.
    Runs without a configuration have no part in it."""
    known = [run.keys for run in runs if run.keys]
    names = dict.fromkeys(name for keys in known for name in keys)
    differ = [name for name in names if len({repr(keys.get(name, "absent")) for keys in known}) > 1]
    return {name: [run.keys.get(name, "absent") if run.keys else "unknown" for run in runs] for name in differ}


def best_run(runs: Sequence[Record], name: str) -> int | None:
    """Which run has the best value of a metric of validation; None where fewer than two have one, or two are equal."""
    sign = -1 if METRICS[name].better == "max" else 1
    found = [run.validation().get(name) for run in runs]
    finite = ((i, values.best) for i, values in enumerate(found) if values is not None and isfinite(values.best))
    values = sorted((sign * best, i) for i, best in finite)
    if len(values) < 2 or values[0][0] == values[1][0]:
        return None
    return values[0][1]
