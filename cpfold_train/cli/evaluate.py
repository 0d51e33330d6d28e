"""``python -m cpfold_train evaluate PREDICTIONS TRUTH``: scores of predicted structures, and their means; or
``evaluate BEFORE AFTER --truth TRUTH``: how they differ between two sets of predictions."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from cpfold_train.data.inputs.inputs import Query, find_queries
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.evaluate.differences import changes, differences_table, write_differences
from cpfold_train.evaluate.predictions import COLUMNS, Row, best_of, by_entry, cell, find_predictions, score_all
from cpfold_train.tables import make_console, make_table
from cpfold_train.whole_file import whole_file

_WIDEST = 6
"""Columns of a score in the table, which then is whole in 80; words of the header go below each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="PREDICTIONS TRUTH: what predict wrote, or a structure file, or a folder, and then .tar shards, structure "
        "files, or folders of these, with the same ids. With --truth: one set of predictions, or two to compare",
    )
    parser.add_argument("--truth", nargs="+", default=[], metavar="TRUTH", help="the truth of one or two sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores, of each interface and ligand too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")


def run(args: argparse.Namespace) -> None:
    """Score all predictions whose truth is there, and print the table.

    Raises:
        ConfigError: there is nothing to score, or there are more than two sets.
        DataError: some could not be scored, after the table of the others.
    """
    for option, file in (("--json", args.json), ("--csv", args.csv)):
        if file and not file.parent.is_dir():
            raise ConfigError(f"{option} {file} is in no folder that exists: make {file.parent}, or type another path")
    sets, truth = (args.paths, args.truth) if args.truth else (args.paths[:1], args.paths[1:])
    if not truth:
        raise ConfigError("evaluate needs predictions and their truth: type evaluate PREDICTIONS TRUTH")
    if len(sets) > 2:
        raise ConfigError(
            f"evaluate compares two sets of predictions, and {len(sets)} are typed: type evaluate BEFORE AFTER --truth "
            "TRUTH"
        )
    files = [find_predictions(Path(path)) for path in sets]
    truths = {query.id: query for query in find_queries(truth)}
    console = make_console()
    scored = [_scored(path, found, truths, truth, console) for path, found in zip(sets, files)]
    rows, problems = [own for own, _ in scored], [problem for _, own in scored for problem in own]
    if len(sets) == 1:
        _report(args, *rows, console)
    elif set.intersection(*({row.id for row in own} for own in rows)):
        _compare(args, sets, *rows, console)
    elif not problems:
        raise ConfigError("the two sets have no entry in common: type the predictions of the same inputs")
    if problems:
        many = sum(map(len, files))
        raise DataError(f"{len(problems)} of {many} predictions could not be scored: {'; '.join(problems)}")


def _scored(
    path: str, files: list[tuple[str, int, Path]], truths: dict[str, Query], truth: list[str], console: Console
) -> tuple[list[Row], list[str]]:
    """Scores of a set, and what was wrong with others; names those without a truth."""
    rows, problems = score_all(files, truths)
    for name in sorted({name for name, _, _ in files} - set(truths)):
        console.print(f"no truth for {name}")
    if not (rows or problems):
        raise ConfigError(
            f"none of the {len(files)} predictions of {path} has a truth in {' '.join(truth)}: ids must agree"
        )
    return rows, problems


def _report(args: argparse.Namespace, rows: list[Row], console: Console) -> None:
    """One set."""
    if rows:
        console.print(scores_table(rows))
    if args.json:
        _write_json(args.json, _as_json(rows))
    if args.csv:
        _write_csv(args.csv, rows)


def _compare(args: argparse.Namespace, sets: list[str], before: list[Row], after: list[Row], console: Console) -> None:
    """Two sets."""
    for name, path in zip(("before", "after "), sets):
        console.print(f"{name}  {path}", soft_wrap=True, highlight=False, markup=False)
    ids = [{row.id for row in rows} for rows in (before, after)]
    for name, alone in (("before", ids[0] - ids[1]), ("after", ids[1] - ids[0])):
        if alone:
            console.print(f"only {name}, and left out: {', '.join(sorted(alone))}", highlight=False)
    first = changes(before, after)
    several = any(len(samples) > 1 for rows in (before, after) for samples in by_entry(rows).values())
    console.print(differences_table(first, changes(before, after, best=True) if several else None))
    if args.json:
        _write_json(args.json, {"before": _as_json(before), "after": _as_json(after)})
    if args.csv:
        write_differences(args.csv, first)


def means(rows: Iterable[Row]) -> dict[str, float | None]:
    """Mean of each score over the samples that have it."""
    numbers = [row.scores.numbers() for row in rows]
    values = {name: [row[name] for row in numbers if row[name] is not None] for name in COLUMNS}
    return {name: mean(found) if found else None for name, found in values.items()}


def summaries(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """Means of all samples, of the first ones (the most confident), and of those with the best lDDT of each entry."""
    entries = by_entry(rows).values()
    return {
        "mean of all": means(rows),
        "mean of the first": means(own[0] for own in entries),
        "mean of the best": means(map(best_of, entries)),
    }


def scores_table(rows: list[Row]) -> Table:
    """A row for each sample, and the means."""
    headers = ["id", "no.", *(name.replace("interface", "iface") for name in COLUMNS.values()), "chains", "atoms %"]
    table = make_table(
        ", ".join(headers),
        text="id",
        caption="RMSD and TM of C-alpha and C1' atoms; the best is by lDDT",
    )
    table.padding, table.columns[0].overflow = 0, "fold"
    for column in table.columns[1:]:
        column.max_width = _WIDEST
    for row in rows:
        numbers = row.scores.numbers()
        cells = [cell(name, numbers[name]) for name in COLUMNS]
        table.add_row(row.id, str(row.sample), *cells, str(row.scores.chains), f"{100 * row.scores.atoms:.0f}")
    table.add_section()
    for name, numbers in summaries(rows).items():
        shown = name.replace("mean of the", "mean,").replace("mean of", "mean,")
        table.add_row(shown, "", *(cell(column, numbers[column]) for column in COLUMNS), "", "")
    return table


def _as_json(rows: list[Row]) -> dict[str, Any]:
    samples = [{"id": row.id, "sample": row.sample, "file": row.file, **asdict(row.scores)} for row in rows]
    return {"means": summaries(rows) if rows else {}, "samples": samples}


def _write_json(path: Path, report: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(report, indent=1) + "\n")


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = list(rows[0].scores.numbers()) if rows else list(COLUMNS)
        writer.writerow(["id", "sample", "file", *names])
        for row in rows:
            writer.writerow([row.id, row.sample, row.file, *row.scores.numbers().values()])
