"""``metrics.csv``: one row an optimizer step, appended to when a run resumes in the same directory."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpfold_train.reports.metrics import COLUMNS
from cpfold_train.whole_file import whole_file


class MetricsFile:
    """Writes :data:`~cpfold_train.reports.metrics.COLUMNS` and leaves out every other metric.

    Rows of the file from the first step logged on are dropped: what an earlier run in the directory did beyond the
    checkpoint that this one resumes from. Metrics of one step that come in several calls share a row; so does a
    validation that a resumed run makes before its first step.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._row: dict[str, Any] = {}
        self._start = 0

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics of a step."""
        if not self._row:
            self._begin(step, metrics)
        if self._row.get("step") == step:
            self._row |= metrics
        else:
            self._row = {"step": step} | metrics
            self._start = self._path.stat().st_size
        with self._path.open("r+", newline="") as file:
            file.seek(self._start)
            file.write(_line([self._row.get(column, "") for column in COLUMNS]))
            file.truncate()

    def _begin(self, step: int, metrics: dict[str, float]) -> None:
        earlier = read_metrics(self._path)
        kept = [[row.get(column, "") for column in COLUMNS] for row in earlier if int(row["step"]) < step]
        with whole_file(self._path) as file:
            file.write("".join(map(_line, [COLUMNS, *kept])))
        made = [row for row in earlier if int(row["step"]) == step and row.get("train/loss")]
        if made and "train/loss" not in metrics:
            self._row, self._start = made[0] | {"step": step}, self._path.stat().st_size


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv`` as text by column; empty where a step has no value, no rows without a file.

    A line that a full disk cut short is none.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
