"""``python -m cpfold_train compare``."""

from __future__ import annotations

import json

import pytest

from cpfold_train.__main__ import main


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
    assert "differ by up to 1.0e-02" in capsys.readouterr().err
    assert main(["compare", runs[0]]) == 2


def test_curves_of_several_runs_are_drawn(runs, tmp_path):
    picture = tmp_path / "pictures" / "runs.png"
    assert main(["compare", *runs, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
