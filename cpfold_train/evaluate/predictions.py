"""Predictions in files, and the scores of all whose truth is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cpfold_train.data.inputs.inputs import Query
from cpfold_train.data.structures.parse import SUFFIXES, entry_id, read_structure
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.evaluate.scores import Scores, score

_SAMPLE = re.compile(r"(.+)_model_(\d+)")
COLUMNS = {
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


def by_entry(rows: list[Row]) -> dict[str, list[Row]]:
    """Samples of each entry, the first one first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.id, []).append(row)
    return found


def best_of(samples: list[Row]) -> Row:
    """The sample with the best lDDT."""
    return max(samples, key=lambda row: row.scores.lddt or 0.0)


def cell(name: str, value: float | None) -> str:
    """A score as tables have it: RMSDs in 0.01 Angstrom, fractions in 0.001."""
    if value is None:
        return ""
    return f"{value:.2f}" if name.endswith("rmsd") else f"{value:.3f}"
