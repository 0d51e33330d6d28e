"""The jobs of a sweep: a table on the terminal, and the same and more as a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cpfold_train.reports.course import Course, course
from cpfold_train.reports.metrics import VALIDATION
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.result_file import read_result
from cpfold_train.tables import make_table
from cpfold_train.whole_file import whole_file


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    Attributes:
        name: its directory, within that of the sweep.
        overrides: what was typed, as ``KEY=VALUE``.
        exit_code: 0 where it was completed.
        seconds: it took, its start included.
        result: what ``result.json`` holds; empty where there is none.
        validation: the course of each metric that was measured.
    """

    name: str
    overrides: list[str]
    exit_code: int
    seconds: float
    result: dict[str, Any]
    validation: dict[str, Course]

    @property
    def status(self) -> str:
        """As the table has it."""
        return "completed" if self.exit_code == 0 else f"failed ({self.exit_code})"

    @property
    def peak_mib(self) -> float | None:
        """Of the rank with the highest."""
        return max(self.result.get("peak_memory_mib", []), default=None)


def read_job(folder: Path, name: str, ended: dict[str, Any]) -> Job:
    """A job from its directory.

    Args:
        folder: of the job.
        name: as it is to be called.
        ended: its ``overrides``, ``exit_code`` and ``seconds``.
    """
    rows = read_metrics(folder / "metrics.csv")
    found = {metric: course(rows, metric) for metric in VALIDATION}
    validation = {metric: values for metric, values in found.items() if values is not None}
    return Job(name, ended["overrides"], ended["exit_code"], ended["seconds"], read_result(folder), validation)


def varied(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Values by key that set each job apart: what all have alike is left out."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    typed = [[override for override in job.overrides if override not in shared] for job in jobs]
    return [{key: value for key, _, value in (override.partition("=") for override in own)} for own in typed]


def jobs_table(jobs: Sequence[Job], title: str) -> Table:
    """A row for each job; val/loss as the best value and its step."""
    table = make_table(
        "job, overrides, status, steps, seconds, train/loss, val/loss, MiB",
        text="job, overrides, status",
        title=escape(title),
        caption="val/loss: best @ step; MiB: peak of a rank",
    )
    for column in table.columns:
        column.no_wrap = column.header != "overrides"
        column.overflow = "fold"
    for job, own in zip(jobs, varied(jobs)):
        loss, best = job.result.get("train/loss"), job.validation.get("val/loss")
        table.add_row(
            escape(job.name),
            Text(" ".join(f"{key}={value}" for key, value in own.items())),
            Text(job.status, "red" if job.exit_code else "green"),
            str(job.result.get("steps", "")),
            f"{job.seconds:.0f}",
            "" if loss is None else f"{loss:.4f}",
            "" if best is None else f"{best.best:.4f} @ {best.best_step}",
            "" if job.peak_mib is None else f"{job.peak_mib:.0f}",
        )
    return table


def best_job(jobs: Sequence[Job]) -> str:
    """A sentence on the job with the best val/loss; empty where fewer than two have one."""
    losses = (job.validation.get("val/loss") for job in jobs)
    pairs = zip(jobs, varied(jobs), losses)
    validated = [(job, own) for job, own, values in pairs if values is not None and isfinite(values.best)]
    if len(validated) < 2:
        return ""
    job, own = min(validated, key=lambda pair: pair[0].validation["val/loss"].best)
    values = job.validation["val/loss"]
    typed = " ".join(f"{key}={value}" for key, value in own.items())
    return f"best val/loss: {values.best:.4f} at step {values.best_step}, job {job.name} ({typed})"


def write_jobs(path: Path, jobs: Sequence[Job]) -> None:
    """A row for each job, with a column for each key that is not the same in all, and all metrics of validation."""
    own = varied(jobs)
    keys = list(dict.fromkeys(key for values in own for key in values))
    metrics = [name for name in VALIDATION if any(name in job.validation for job in jobs)]
    of_metric = ("first", "best", "best_step", "last", "last_step")
    with whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["job", "status", "exit_code", "steps", "seconds", *keys, "train/loss", "peak_memory_mib"]
        writer.writerow([*columns, *(f"{name} {part}" for name in metrics for part in of_metric)])
        for job, values in zip(jobs, own):
            row = [job.name, job.status, job.exit_code, job.result.get("steps", ""), job.seconds]
            row += [*(values.get(key, "") for key in keys), job.result.get("train/loss", ""), job.peak_mib]
            for name in metrics:
                found = job.validation.get(name)
                row += [getattr(found, part) if found else "" for part in of_metric]
            writer.writerow(row)
