"""``python -m cpfold_train compare RUN RUN ...``: do runs that should train alike have the same curve?"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cpfold_train.errors import ConfigError, DataError
from cpfold_train.reports.curves import draw_runs
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.result_file import read_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, the reference first")
    parser.add_argument("--within", type=float, metavar="R", help="fail where a loss differs by more than R, relative")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw losses and scores of all runs, such as runs.png"
    )


def run(args: argparse.Namespace) -> None:
    """Print the largest relative difference of the training loss of each run to the first, over the steps of both.

    Raises:
        ConfigError: with fewer than two runs.
        DataError: where a directory has no metrics, two runs share no step, or ``--within`` is exceeded.
    """
    if len(args.runs) < 2:
        raise ConfigError("compare needs at least two run directories: type the reference first")
    curves = [_losses(folder) for folder in args.runs]
    table = Table("run", "grid", "dp", "steps compared", "largest relative difference", "at step")
    worst, cut_short = 0.0, False
    for folder, curve in zip(args.runs, curves):
        common = sorted(curve.keys() & curves[0].keys())
        if not common:
            raise DataError(f"{folder} and {args.runs[0]} have no step in common")
        difference = {step: abs(curve[step] / curves[0][step] - 1) for step in common}
        # A loss that is not a number agrees with nothing.
        difference = {step: d if d == d else float("inf") for step, d in difference.items()}
        step = max(common, key=lambda at: difference[at])
        cut_short |= curve.keys() != curves[0].keys()
        worst = max(worst, difference[step])
        result = read_result(folder)
        grid, dp = str(result.get("grid", "")), str(result.get("dp", ""))
        table.add_row(str(folder), grid, dp, str(len(common)), f"{difference[step]:.1e}", str(step))
    Console().print(table)
    if args.plot:
        draw_runs(args.runs, args.plot)
        print(args.plot)
    if args.within is not None and cut_short:
        raise DataError("the runs do not have the same steps, so they cannot be said to agree")
    if args.within is not None and worst > args.within:
        raise DataError(f"the losses differ by up to {worst:.1e}, more than {args.within:g}")


def _losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.csv"
    if not path.exists():
        raise DataError(f"{folder} has no metrics.csv: name the directory of a run, such as runs/DATE/TIME")
    return {int(row["step"]): float(row["train/loss"]) for row in read_metrics(path) if row["train/loss"]}
