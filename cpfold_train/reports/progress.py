"""How far a run is: a bar on a terminal, a line for each log interval elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cpfold_train.reports.metrics import progress_bar

_SHORTEST = 8
"""Columns of the bar at least; metrics that would leave less are not shown."""


@dataclass
class Progress:
    """What is known of a run at some step.

    Attributes:
        step: optimizer steps made, those before a resume included.
        total: steps of the whole run; None where no number of steps ends it.
        part: how much of the run is done, from 0 to 1; None where it has no end.
        seconds_left: until its end, as far as is known.
        row: metrics of the last logged step.
        validation: val/loss of the last validation.
        validated_at: step of the last validation.
        validating: batches of the validation at hand that are done, and all of them; None outside of one.
    """

    step: int = 0
    total: int | None = None
    part: float | None = None
    seconds_left: float | None = None
    row: dict[str, float] = field(default_factory=dict)
    validation: float | None = None
    validated_at: int = 0
    validating: tuple[int, int] | None = None


def line(progress: Progress) -> str:
    """The line of a log interval: step, loss, learning rate, seconds a step and the last validation."""
    row = progress.row
    parts = [_steps(progress), f"loss {row['train/loss']:.4f}", f"lr {row['lr']:.2e}", f"{row['step_s']:.2f} s/step"]
    if progress.validation is not None:
        parts.append(f"val/loss {progress.validation:.4f} @ {progress.validated_at}")
    if progress.seconds_left is not None:
        parts.append(f"{clock(progress.seconds_left)} left")
    return "  ".join(parts)


def bar(progress: Progress, width: int) -> Table:
    """One line of at most ``width`` columns; what does not fit beside the bar is left out, from the end."""
    before, after = _steps(progress), []
    if progress.seconds_left is not None:
        after.append(f"{clock(progress.seconds_left)} left")
    for part in _metrics(progress):
        if len("  ".join([before, *after, part])) + 2 + _SHORTEST <= width:
            after.append(part)
    text = "  ".join(after)
    grid = Table.grid(padding=(0, 2, 0, 0))
    drawn = width - len(before) - len(text) - 5
    cells: list[RenderableType] = [Text(before, no_wrap=True)]
    if progress.part is not None and drawn > 0:
        cells.append(ProgressBar(total=1.0, completed=progress.part, width=min(drawn, 40)))
    grid.add_row(*cells, Text(text, no_wrap=True))
    return grid


def _metrics(progress: Progress) -> list[str]:
    """What is shown beside the bar, the most important first."""
    shown = progress_bar(progress.row)
    loss, pace = shown.pop("loss", None), shown.pop("s/step", None)
    parts = [f"validation {progress.validating[0]}/{progress.validating[1]}"] if progress.validating else []
    parts += [f"loss {loss:.4f}"] if loss is not None else []
    parts += [f"val {progress.validation:.4f} @ {progress.validated_at}"] if progress.validation is not None else []
    parts += [f"{pace:.2f} s/step"] if pace is not None else []
    return parts + [f"{value:.4g} {name}" for name, value in shown.items()]


def _steps(progress: Progress) -> str:
    return f"step {progress.step}" + (f"/{progress.total}" if progress.total is not None else "")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds; from a day on, days and hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
