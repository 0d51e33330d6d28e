"""``python -m cpfold_train compare``."""

from __future__ import annotations

import csv
import json

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from cpfold_train.__main__ import main
from cpfold_train.reports import compare


@pytest.fixture
def runs(tmp_path):
    """Two runs of three steps, the second of which is off by one percent in the last."""
    for name, last in (("a", 2.0), ("b", 2.02)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [f"{step},{loss},{loss / 2},{'0.5' if step == 2 else ''}" for step, loss in enumerate((4.0, 3.0, last))]
        (folder / "metrics.csv").write_text("\n".join(["step,train/loss,train/distogram,val/distance_lddt", *rows]))
        (folder / "result.json").write_text(json.dumps({"grid": "2x2", "dp": 1}))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_the_largest_difference_is_told(runs, capsys):
    assert main(["compare", *runs, "--within", "0.02"]) == 0
    told = capsys.readouterr().out
    assert "1.0e-02" in told and "2x2" in told
    assert main(["compare", *runs, "--within", "0.005"]) != 0
    assert "1.0e-02" in capsys.readouterr().err
    assert main(["compare", runs[0]]) == 2


def test_curves_of_several_runs_are_drawn(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *points, label, **_: drawn.append((label, points)))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    picture = tmp_path / "pictures" / "runs.png"
    assert main(["compare", *runs, "--plot", str(picture)]) == 0
    # Both losses of training, and the lDDT of one validation, of each run; nothing else was measured.
    assert [label for label, _ in drawn] == ["A a", "B b"] * 3
    assert drawn[0] == ("A a", ((0, 1, 2), (4.0, 3.0, 2.0)))
    assert drawn[2] == ("A a", ((0, 1, 2), (2.0, 1.5, 1.0)))
    assert drawn[5] == ("B b", ((2,), (0.5,)))
    assert picture.exists()


@pytest.fixture
def validated(tmp_path):
    """Three validated runs: the second has the best loss in the middle, the third, of other crops, the best lDDT."""
    values = {"plain": [(9.0, 0.1), (5.0, 0.5), (4.0, 0.6)], "b" * 100: [(9.0, 0.1), (3.0, 0.4), (3.5, 0.6)]}
    values["other"] = [(9.0, 0.1), (8.0, 0.7), ("nan", 0.65)]
    folders = []
    for number, (name, found) in enumerate(values.items()):
        folder = tmp_path / name
        folder.mkdir()
        rows = [f"{100_000 * i},{loss},{lddt}" for i, (loss, lddt) in enumerate(found)]
        (folder / "metrics.csv").write_text("\n".join(["step,val/loss,val/distance_lddt", *rows]))
        config = {"optim": {"lr": 1e-3 * (1 + number // 2), "betas": [0.9, 0.95]}, "crop_size": 64 * (1 + number // 2)}
        config["model"] = {"init_from": f"/weights/{name}.ckpt"}
        (folder / "resolved.yaml").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps({"status": "completed", "seconds": 61, "grid": "2x2", "dp": 1}))
        folders.append(folder)
    return folders


def test_which_run_is_better_and_what_was_different(validated, capsys, monkeypatch):
    monkeypatch.setattr(compare, "make_console", lambda: Console(width=80))
    assert main(["compare", *map(str, validated)]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    told = " ".join(text.split())
    assert "optim.lr 0.001 0.001 0.002" in told and "crop_size 64 64 128" in told and "betas" not in told
    assert "A 9.0000 4.0000 @ 200000 4.0000 @ 200000" in told
    assert "B 9.0000 * 3.0000 @ 100000 3.5000 @ 200000" in told
    assert "C 0.1000 * 0.7000 @ 100000 0.6500 @ 200000" in told and "C 9.0000 8.0000 @ 100000 nan @ 200000" in told
    assert "no run is better in most metrics of validation" in told
    assert "the best value: B in val/loss; C in val/distance_lddt" in told
    assert "validation may not be of the same crops: crop_size" in told

    assert main(["compare", *map(str, validated[:2])]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "B is better in 1 of 2 metrics of validation" in told and "equal in val/distance_lddt" in told
    assert "not be of the same crops" not in told and "optim.lr" not in told
    # There is no loss of training to compare.
    assert main(["compare", *map(str, validated[:2]), "--within", "1"]) == 2
    assert "no step in common" in capsys.readouterr().err


def test_a_row_for_each_run(validated, tmp_path):
    table = tmp_path / "tables" / "runs.csv"
    assert main(["compare", *map(str, validated), "--csv", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["run"] for row in rows] == [*map(str, validated)]
    assert [row["crop_size"] for row in rows] == ["64", "64", "128"]
    assert [(row["val/loss best"], row["val/loss best_step"]) for row in rows[1:]] == [
        ("3.0", "100000"),
        ("8.0", "100000"),
    ]
    assert rows[2]["val/loss last"] == "nan" and rows[0]["seconds"] == "61" and rows[0]["status"] == "completed"
