"""Curves of one run or of several, drawn from their ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpfold_train.reports.metrics import METRICS, charts
from cpfold_train.reports.metrics_csv import read_metrics

_ACROSS = 3
"""Charts side by side."""


def draw_curves(metrics: Path, path: Path) -> None:
    """Training and validation loss, and the validation's scores, against the step."""
    if not (rows := read_metrics(metrics)):
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    shown = charts()
    for axis, names in zip(figure.subplots(1, len(shown)), shown.values()):
        for name in names:
            _draw_column(axis, rows, name, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_runs(runs: Mapping[str, list[dict[str, str]]], path: Path) -> None:
    """Losses and scores of several runs against the step, a chart for each metric that any of them has.

    Args:
        runs: rows of ``metrics.csv``, by what the run is called.
        path: of the picture.
    """
    names = [name for name, metric in METRICS.items() if metric.compared and _has(runs.values(), name)]
    across = min(len(names), _ACROSS)
    down = -(-len(names) // max(across, 1))
    figure = Figure(figsize=(4.5 * max(across, 1), 3.5 * max(down, 1)), layout="constrained")
    frames: Sequence[Axes] = figure.subplots(down, across, squeeze=False).ravel().tolist() if names else []
    for chart in frames[len(names) :]:
        chart.set_axis_off()
    for chart, name in zip(frames, names):
        for label, rows in runs.items():
            _draw_column(chart, rows, name, label)
        chart.set_title(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _has(runs: Iterable[list[dict[str, str]]], name: str) -> bool:
    return any(row.get(name) for rows in runs for row in rows)


def _draw_column(axis: Axes, rows: list[dict[str, str]], name: str, label: str) -> None:
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    if points:
        axis.plot(*zip(*points), label=label, marker="o" if len(points) < 30 else None, markersize=3)
        axis.legend()
    axis.set_xlabel("step")
