"""Curves of one run or of several, drawn from their ``metrics.csv``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpfold_train.reports.metrics import METRICS, charts
from cpfold_train.reports.metrics_csv import read_metrics


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


def draw_runs(runs: list[Path], path: Path) -> None:
    """The metrics that several runs are compared by, against the step."""
    names = [name for name, metric in METRICS.items() if metric.compared]
    figure = Figure(figsize=(3.5 * len(names), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names):
        for run in runs:
            _draw_column(axis, read_metrics(run / "metrics.csv"), name, str(run))
        axis.set_title(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_column(axis: Axes, rows: list[dict[str, str]], name: str, label: str) -> None:
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    if points:
        axis.plot(*zip(*points), label=label, marker="o" if len(points) < 30 else None, markersize=3)
        axis.legend()
    axis.set_xlabel("step")
