"""``python -m cpfold_train evaluate PREDICTIONS TRUTH``: scores of predicted structures, and their means."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from rich.table import Table

from cpfold_train.data.inputs.inputs import Query, find_queries
from cpfold_train.data.structures.parse import SUFFIXES, entry_id, read_structure
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.evaluate.scores import Scores, score
from cpfold_train.tables import make_console, make_table
from cpfold_train.whole_file import whole_file

_SAMPLE = re.compile(r"(.+)_model_(\d+)")
_COLUMNS = {
    "lddt": "lDDT",
    "tm_score": "TM",
    "rmsd": "RMSD Å",
    "interface_lddt": "interface lDDT",
    "fnat": "fnat",
    "dockq": "DockQ",
    "ligand_rmsd": "ligand RMSD Å",
}
"""Scores that have a column and a mean, with the header of each."""


@dataclass(frozen=True)
class Row:
    """A sample of an entry and its scores."""

    id: str
    sample: int
    file: str
    scores: Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS", help="what predict wrote, or a structure file, or a folder"
    )
    parser.add_argument(
        "truth", nargs="+", metavar="TRUTH", help=".tar shards, structure files, or folders of these, with the same ids"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores, of each interface and ligand too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")


def run(args: argparse.Namespace) -> None:
    """Score all predictions whose truth is there, and print the table.

    Raises:
        ConfigError: there is nothing to score.
        DataError: some could not be scored, after the table of the others.
    """
    for option, file in (("--json", args.json), ("--csv", args.csv)):
        if file and not file.parent.is_dir():
            raise ConfigError(f"{option} {file} is in no folder that exists: make {file.parent}, or type another path")
    files = find_predictions(args.predictions)
    truths = {query.id: query for query in find_queries(args.truth)}
    rows, problems = score_all(files, truths)
    console = make_console()
    if rows:
        console.print(scores_table(rows))
    for name in sorted({name for name, _, _ in files} - set(truths)):
        console.print(f"no truth for {name}")
    if args.json:
        with whole_file(args.json) as file:
            file.write(json.dumps(_as_json(rows), indent=1) + "\n")
    if args.csv:
        _write_csv(args.csv, rows)
    if problems:
        raise DataError(f"{len(problems)} of {len(files)} predictions could not be scored: {'; '.join(problems)}")
    if not rows:
        raise ConfigError(f"none of the {len(files)} predictions has a truth in {' '.join(args.truth)}: ids must agree")


def find_predictions(path: Path) -> list[tuple[str, int, Path]]:
    """Id, number of the sample and file of each prediction: ``ID_model_2.cif`` is sample 2 of ID, ``ID.cif`` sample 0.

    Raises:
        ConfigError: there is none.
    """
    listed = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in listed if file.name.removesuffix(".gz").endswith(SUFFIXES)]
    if not files:
        raise ConfigError(f"{path} holds no structure file: type the folder that predict wrote after --out")
    found = []
    for file in files:
        name = entry_id(file)
        sample = _SAMPLE.fullmatch(name)
        found.append((sample[1], int(sample[2]), file) if sample else (name, 0, file))
    return sorted(found, key=lambda prediction: prediction[:2])


def score_all(files: list[tuple[str, int, Path]], truths: dict[str, Query]) -> tuple[list[Row], list[str]]:
    """Scores of all predictions that have a truth, and what was wrong with others."""
    rows, problems = [], []
    known: tuple[str, Structure] | None = None
    for name, sample, file in files:
        if name not in truths:
            continue
        try:
            # Samples of one entry follow each other.
            if known is None or known[0] != name:
                known = name, truths[name].read().structure
            rows.append(Row(name, sample, str(file), score(known[1], read_structure(file)[0])))
        except DataError as error:
            problems.append(f"{file.name}: {error}")
    return rows, problems


def means(rows: Iterable[Row]) -> dict[str, float | None]:
    """Mean of each score over the samples that have it."""
    numbers = [row.scores.numbers() for row in rows]
    values = {name: [row[name] for row in numbers if row[name] is not None] for name in _COLUMNS}
    return {name: mean(found) if found else None for name, found in values.items()}


def summaries(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """Means of all samples, of the first ones (the most confident), and of those with the best lDDT of each entry."""
    by_id: dict[str, list[Row]] = {}
    for row in rows:
        by_id.setdefault(row.id, []).append(row)
    best = [max(own, key=lambda row: row.scores.lddt or 0.0) for own in by_id.values()]
    return {
        "mean of all": means(rows),
        "mean of the first": means(own[0] for own in by_id.values()),
        "mean of the best": means(best),
    }


def scores_table(rows: list[Row]) -> Table:
    """A row for each sample, and the means."""
    headers = ["id", "sample", *_COLUMNS.values(), "chains", "atoms %"]
    table = make_table(
        ", ".join(headers), text="id", caption="RMSD and TM of C-alpha and C1' atoms; the best is by lDDT"
    )
    for row in rows:
        numbers = row.scores.numbers()
        cells = [_cell(name, numbers[name]) for name in _COLUMNS]
        table.add_row(row.id, str(row.sample), *cells, str(row.scores.chains), f"{100 * row.scores.atoms:.0f}")
    table.add_section()
    for name, numbers in summaries(rows).items():
        table.add_row(name, "", *(_cell(column, numbers[column]) for column in _COLUMNS), "", "")
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if name.endswith("rmsd") else f"{value:.3f}"


def _as_json(rows: list[Row]) -> dict:
    samples = [{"id": row.id, "sample": row.sample, "file": row.file, **asdict(row.scores)} for row in rows]
    return {"means": summaries(rows) if rows else {}, "samples": samples}


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = list(rows[0].scores.numbers()) if rows else list(_COLUMNS)
        writer.writerow(["id", "sample", "file", *names])
        for row in rows:
            writer.writerow([row.id, row.sample, row.file, *row.scores.numbers().values()])
