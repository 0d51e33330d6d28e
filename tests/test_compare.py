"""``python -m cpfold_train compare``."""

from __future__ import annotations

import json

import pytest
from matplotlib.axes import Axes

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
    assert "1.0e-02" in capsys.readouterr().err
    assert main(["compare", runs[0]]) == 2


def test_curves_of_several_runs_are_drawn(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *points, label, **_: drawn.append((label, points)))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    picture = tmp_path / "pictures" / "runs.png"
    assert main(["compare", *runs, "--plot", str(picture)]) == 0
    assert drawn[0] == (runs[0], ((0, 1, 2), (2.0, 1.5, 1.0)))
    # The distogram's loss in training, and the lDDT of one validation, of each run.
    assert [label for label, _ in drawn] == [runs[0], runs[1], runs[0], runs[1]]
    assert drawn[3] == (runs[1], ((2,), (0.5,)))
    assert picture.exists()
