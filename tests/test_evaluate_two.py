"""Two sets of predictions of one truth, side by side."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cpfold_train.__main__ import main
from cpfold_train.cli import evaluate
from cpfold_train.data.features.atoms import crop_atoms
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.evaluate.differences import Change, changes, differences_table, means
from cpfold_train.evaluate.predictions import Row
from cpfold_train.evaluate.scores import Scores
from cpfold_train.predict.write import write_structure

SHARD = "data/shards/train-000000.tar"
LONG = "an_entry_with_a_long_name_" * 4


def scores(lddt: float | None, dockq: dict[str, float], ligands: dict[str, float]) -> Scores:
    interfaces = [
        {"chains": chains, "fnat": value, "irmsd": 2.0, "lrmsd": 3.0, "dockq": value} for chains, value in dockq.items()
    ]
    found = sum(dockq.values()) / len(dockq) if dockq else None
    rmsd = sum(ligands.values()) / len(ligands) if ligands else None
    kinds = [{"chain": chain, "rmsd": value} for chain, value in ligands.items()]
    return Scores(lddt, 0.9, 1.5, lddt, found, found, rmsd, 2, 1.0, interfaces, kinds)


def rows(**entries: list[Scores]) -> list[Row]:
    return [Row(name, i, f"{name}_model_{i}.cif", one) for name, own in entries.items() for i, one in enumerate(own)]


@pytest.fixture
def two():
    """An entry that has become better, of which one interface is worse; one that has no score after; one alone."""
    complex_before = scores(0.5, {"A-B": 0.4, "A-C": 0.6}, {"D": 4.0})
    complex_after = scores(0.75, {"A-B": 0.7, "A-C": 0.55}, {"D": 2.0})
    before = rows(x=[complex_before, complex_before], **{LONG: [scores(0.8, {}, {})]}, alone=[complex_before])
    after = rows(x=[complex_after, scores(0.9, {}, {})], **{LONG: [scores(None, {}, {})]})
    return before, after


def test_changes_by_entry_and_interface(two):
    found = {(change.id, change.score, change.chains): change for change in changes(*two)}
    assert {name for name, *_ in found} == {"x", LONG}
    assert found["x", "lddt", ""].difference == pytest.approx(0.25) and found["x", "lddt", ""].verdict == "better"
    assert [found["x", "dockq", chains].verdict for chains in ("A-B", "A-C")] == ["better", "worse"]
    assert found["x", "ligand_rmsd", "D"].difference == -2 and found["x", "ligand_rmsd", "D"].verdict == "better"
    assert found["x", "irmsd", "A-B"].verdict == found["x", "rmsd", ""].verdict == "same"
    assert found[LONG, "lddt", ""].verdict == "" and (LONG, "dockq", "") not in found
    # What has no score in one of the sets is in no mean.
    summary = {change.score: (change, better, count) for change, better, count in means(found.values())}
    assert summary["lddt"] == (Change("mean", "lddt", "", 0.5, 0.75), 1, 1)
    assert summary["tm_score"][1:] == (0, 2)
    best = {(change.id, change.score): change.after for change in changes(*two, best=True) if not change.chains}
    assert best["x", "lddt"] == 0.9


def test_an_interface_of_one_set_alone():
    found = changes(rows(x=[scores(0.5, {"A-B": 0.4}, {})]), rows(x=[scores(0.5, {"B-C": 0.4}, {})]))
    assert [(c.chains, c.before, c.after) for c in found if c.chains and c.score == "dockq"] == [
        ("A-B", 0.4, None),
        ("B-C", None, 0.4),
    ]


def test_the_table_is_whole_in_80_columns(two):
    file = io.StringIO()
    Console(file=file, width=80).print(differences_table(changes(*two), changes(*two, best=True)))
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text
    told = " ".join(text.split())
    assert "x lDDT 0.500 0.750 +0.250 better" in told and "DockQ A-C 0.600 0.550 -0.050 worse" in told
    assert "ligand RMSD Å D 4.00 2.00 -2.00 better" in told
    assert "mean, first lDDT 0.500 0.750 +0.250 better in 1 of 1" in told
    assert "mean, best lDDT 0.500 0.900 +0.400 better in 1 of 1" in told


def test_the_table_of_one_set_is_whole_in_80_columns():
    file = io.StringIO()
    Console(file=file, width=80).print(evaluate.scores_table(rows(**{"1abc": [scores(0.5, {"A-B": 0.4}, {"D": 4.0})]})))
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text
    for word in ("iface", "ligand", "chains", "DockQ", "atoms", "mean, first", "100"):
        assert word in text


def write(folder: Path, noise: float) -> None:
    """A prediction of 1kd8: the truth, off by noise."""
    structure = read_sample(next(entry for entry in open_shards([SHARD]) if entry.key == "1kd8"))[0]
    tokens = np.arange(len(structure.asym_id))
    atoms = crop_atoms(structure, tokens)
    drawn = noise * np.random.default_rng(0).standard_normal((len(atoms.atom), 3))
    folder.mkdir(parents=True)
    write_structure(folder / "1kd8.cif", structure, tokens, atoms, structure.coords[atoms.atom] + drawn, None, "1kd8")


def test_two_folders(tmp_path, capsys):
    before, after, table, report = (tmp_path / name for name in ("old", "new", "scores.csv", "scores.json"))
    write(before, 1.0)
    write(after, 0.3)
    shutil.copy(after / "1kd8.cif", after / "other.cif")
    files = ["--csv", str(table), "--json", str(report)]
    assert main(["evaluate", str(before), str(after), "--truth", SHARD, *files]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"before {before}" in told and f"after {after}" in told and "no truth for other" in told
    assert "better in 1 of 1" in told and "mean, best" not in told
    found = {(row["score"], row["chains"]): row for row in csv.DictReader(table.open())}
    assert found["lddt", ""]["after_is"] == found["rmsd", ""]["after_is"] == "better"
    assert float(found["rmsd", ""]["difference"]) < -0.5
    interfaces = {chains for score, chains in found if score == "dockq"}
    assert {"", "A-B"} < interfaces and all(found["fnat", chains]["before"] for chains in interfaces)
    assert {*json.loads(report.read_text())} == {"before", "after"}


def test_sets_that_cannot_be_compared(tmp_path, capsys, monkeypatch):
    assert main(["evaluate", "a", "b", "c", "--truth", SHARD]) == 2
    assert "evaluate BEFORE AFTER --truth" in capsys.readouterr().err
    assert main(["evaluate", "a"]) == 2
    assert "evaluate PREDICTIONS TRUTH" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "find_predictions", lambda path: [(path.name, 0, path)])
    monkeypatch.setattr(evaluate, "find_queries", lambda truth: [])
    monkeypatch.setattr(evaluate, "score_all", lambda found, truths: (rows(**{found[0][0]: [scores(1, {}, {})]}), []))
    assert main(["evaluate", "a", "b", "--truth", SHARD]) == 2
    assert "no entry in common" in capsys.readouterr().err
