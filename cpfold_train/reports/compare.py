"""``python -m cpfold_train compare RUN RUN ...``: which run is better, and what was different?"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from cpfold_train.errors import ConfigError, DataError
from cpfold_train.reports.curves import draw_runs
from cpfold_train.reports.metrics import METRICS, VALIDATION
from cpfold_train.reports.progress import clock
from cpfold_train.reports.record import Record, best_run, changed_keys, read_record
from cpfold_train.reports.shell import shown
from cpfold_train.tables import make_block, make_console, make_table
from cpfold_train.whole_file import whole_file

OF_VALIDATION = ("data.val", "data.crop", "data.max_", "crop_size", "seed", "trainer.limit_val", "diffusion.validation")
"""How keys begin that say what validation is made of; scores of other crops cannot be compared."""

_LABEL = 30
"""Characters of a run's name that a chart has room for."""


class Difference(NamedTuple):
    """Largest relative difference of the training loss to that of the first run, where, and over how many steps."""

    largest: float
    step: int
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, the reference first")
    parser.add_argument("--within", type=float, metavar="R", help="fail where a loss differs by more than R, relative")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw losses and scores of all runs, such as runs.png"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each run: what differs, and scores")


def run(args: argparse.Namespace) -> None:
    """Print what was different and which run is better.

    Raises:
        ConfigError: with fewer than two runs, or more than there are letters.
        DataError: where a directory has no metrics, or ``--within`` is exceeded or cannot be checked.
    """
    if not 2 <= len(args.runs) <= len(ascii_uppercase):
        raise ConfigError(f"compare takes two to {len(ascii_uppercase)} run directories: type the reference first")
    runs = [read_record(folder) for folder in args.runs]
    differences = [difference(run, runs[0]) for run in runs]
    changed = changed_keys(runs)
    console = make_console()
    described = [_described(run, None if run is runs[0] else found) for run, found in zip(runs, differences)]
    console.print(make_block(zip(ascii_uppercase, described)))
    console.print(_keys_table(changed, len(runs)) if changed else "\nno key of the configurations differs\n")
    if any(run.validation() for run in runs):
        console.print(_validation_table(runs))
        console.print(answer(runs), highlight=False)
    if other := [key for key in changed if key.startswith(OF_VALIDATION)]:
        console.print(f"validation may not be of the same crops: {', '.join(other)}", highlight=False)
    if args.plot:
        draw_runs(
            {f"{name} {run.folder.name[:_LABEL]}": run.rows for name, run in zip(ascii_uppercase, runs)}, args.plot
        )
        print(args.plot)
    if args.csv:
        write_csv(args.csv, runs, differences, changed)
        print(args.csv)
    if args.within is not None:
        _require_within(args.within, runs, differences)


def difference(run: Record, reference: Record) -> Difference:
    """Of the training losses of two runs over the steps of both, if there are any."""
    curve, expected = _losses(run), _losses(reference)
    relative = {step: abs(curve[step] / expected[step] - 1) for step in sorted(curve.keys() & expected.keys())}
    if not relative:
        return Difference(0.0, 0, 0)
    # A loss that is not a number agrees with nothing.
    relative = {step: value if value == value else float("inf") for step, value in relative.items()}
    step = max(relative, key=lambda at: relative[at])
    return Difference(relative[step], step, len(relative))


def answer(runs: Sequence[Record]) -> str:
    """Which run has the best value of which metric of validation, in a sentence."""
    measured = [name for name in VALIDATION if sum(name in run.validation() for run in runs) > 1]
    winners = {name: best_run(runs, name) for name in measured}
    by_run = {i: [name for name in measured if winners[name] == i] for i in range(len(runs))}
    equal = [name for name in measured if winners[name] is None]
    parts = [f"{ascii_uppercase[i]} in {', '.join(names)}" for i, names in by_run.items() if names]
    if not measured:
        return "only one of the runs was validated"
    counts = sorted((len(names) for names in by_run.values()), reverse=True)
    lead = "no run is better in most metrics of validation"
    if counts[0] > counts[1]:
        best = next(i for i, names in by_run.items() if len(names) == counts[0])
        lead = f"{ascii_uppercase[best]} is better in {counts[0]} of {len(measured)} metrics of validation"
    return f"{lead}; the best value: " + "; ".join([*parts, *([f"equal in {', '.join(equal)}"] if equal else [])])


def write_csv(
    path: Path, runs: Sequence[Record], differences: Sequence[Difference], changed: dict[str, list[Any]]
) -> None:
    """A row for each run: how it ended, the keys that differ, and first, best and last value of each validation."""
    names = [name for name in VALIDATION if any(name in run.validation() for run in runs)]
    of_metric = ("first", "best", "best_step", "last", "last_step")
    columns = ["run", "status", "steps", "seconds", "grid", "dp", *changed]
    columns += [f"{name} {part}" for name in names for part in of_metric]
    with whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, "largest_relative_difference", "difference_step"])
        for i, (run, found) in enumerate(zip(runs, differences)):
            row = [run.folder, run.status, run.steps, *(run.result.get(key, "") for key in ("seconds", "grid", "dp"))]
            row += [values[i] for values in changed.values()]
            for name in names:
                values = run.validation().get(name)
                row += [getattr(values, part) if values else "" for part in of_metric]
            writer.writerow([*row, *((found.largest, found.step) if found.steps else ("", ""))])


def _described(run: Record, found: Difference | None) -> str:
    """A run in a few words, below its directory; with its difference to the first one, unless it is that."""
    result = run.result
    parts = [run.status, f"{run.steps} steps" + (f" in {clock(result['seconds'])}" if "seconds" in result else "")]
    parts += [f"grid {result['grid']}, dp {result.get('dp', 1)}"] if "grid" in result else []
    if found is not None and not found.steps:
        parts.append("no logged step in common with A")
    elif found is not None and found.largest:
        parts.append(
            f"training loss differs from A's by up to {found.largest:.1e}, at step {found.step} of {found.steps}"
        )
    elif found is not None:
        parts.append(f"training loss as A's in {found.steps} steps")
    return f"{shown(run.folder)}\n{', '.join(parts)}"


def _keys_table(changed: dict[str, list[Any]], runs: int) -> Table:
    names = ", ".join(["changed key", *ascii_uppercase[:runs]])
    table = make_table(names, text=names)
    for column in table.columns:
        column.overflow = "fold"
    for key, values in changed.items():
        # Records have absolute paths.
        told = ("null" if value is None else str(value).replace(f"{Path.cwd()}/", "") for value in values)
        table.add_row(key, *map(Text, told))
    return table


def _validation_table(runs: Sequence[Record]) -> Table:
    table = make_table("metric, run, first, best @ step, last @ step", text="metric, run", caption="* the best")
    table.columns[0].no_wrap = True
    arrows = {"min": "↓", "max": "↑"}
    for name in VALIDATION:
        courses = [run.validation().get(name) for run in runs]
        best = best_run(list(runs), name)
        shown_name = f"{name} {arrows[METRICS[name].better]}"
        for i, values in enumerate(courses):
            if values is None:
                continue
            table.add_row(
                shown_name,
                ascii_uppercase[i],
                f"{values.first:.4f}",
                Text(f"{'* ' * (i == best)}{values.best:.4f} @ {values.best_step}", "green" if i == best else ""),
                f"{values.last:.4f} @ {values.last_step}",
            )
            shown_name = ""
        if any(courses):
            table.add_section()
    return table


def _require_within(limit: float, runs: Sequence[Record], differences: Sequence[Difference]) -> None:
    """Raise DataError unless all runs have the same steps, and their losses differ by no more than the limit."""
    for run, found in zip(runs, differences):
        if not found.steps:
            raise DataError(f"{run.folder} and {runs[0].folder} have no step in common")
    if any(_losses(run).keys() != _losses(runs[0]).keys() for run in runs):
        raise DataError("the runs do not have the same steps, so they cannot be said to agree")
    worst = max(found.largest for found in differences)
    if worst > limit:
        raise DataError(f"the losses differ by up to {worst:.1e}, more than {limit:g}")


def _losses(run: Record) -> dict[int, float]:
    return {int(row["step"]): float(row["train/loss"]) for row in run.rows if row.get("train/loss")}
