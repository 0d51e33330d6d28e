"""How a metric went over a run: first, best and last."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from cpfold_train.reports.metrics import METRICS

WINDOW = 10
"""Logged steps whose mean stands for the begin or the end of a training curve: single steps have other samples."""


class Course(NamedTuple):
    """A metric over a run.

    Attributes:
        first, last: its values.
        first_step, last_step: where they were measured.
        best: the best finite value; the last one where there is none, or where no value is better than another.
        best_step: the first step that has it.
    """

    first: float
    first_step: int
    best: float
    best_step: int
    last: float
    last_step: int


def course(rows: Sequence[dict[str, str]], name: str) -> Course | None:
    """Of the rows of a ``metrics.csv``; None where the metric was never measured."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    if not points:
        return None
    (first_step, first), (last_step, last) = points[0], points[-1]
    finite = [point for point in points if isfinite(point[1])]
    if METRICS[name].better and finite:
        sign = -1 if METRICS[name].better == "max" else 1
        best_step, best = min(finite, key=lambda point: sign * point[1])
    else:
        best_step, best = last_step, last
    return Course(first, first_step, best, best_step, last, last_step)


def trend(rows: Sequence[dict[str, str]], name: str) -> tuple[float, float] | None:
    """Means of a metric over its first and its last rows: ``WINDOW`` of them, or half of those that there are; None
    where it has no finite value."""
    values = [value for row in rows if row.get(name) and isfinite(value := float(row[name]))]
    if not values:
        return None
    count = max(min(WINDOW, len(values) // 2), 1)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def verdict(name: str, before: float, after: float) -> str:
    """``better``, ``worse`` or ``same``, of the second of two values of a metric."""
    if before == after:
        return "same"
    return "better" if (after > before) == (METRICS[name].better == "max") else "worse"
