"""When a prediction counts as made."""

from __future__ import annotations

import json

import pytest

from cpfold_train.predict.results import completed

COMPLETE = json.dumps({"samples": [{"file": "x_model_0.cif"}, {"file": "x_model_1.cif"}]})


@pytest.mark.parametrize(
    ("told", "structures", "done"),
    [
        (COMPLETE, ("data_x", "data_x"), True),
        (COMPLETE, ("data_x",), False),
        (COMPLETE, ("data_x", ""), False),
        (COMPLETE[:20], ("data_x", "data_x"), False),
        ("", ("data_x", "data_x"), False),
        (json.dumps({"samples": []}), (), False),
        (None, ("data_x", "data_x"), False),
    ],
    ids=["complete", "a structure is missing", "a structure is empty", "cut off", "empty", "no sample", "not told"],
)
def test_a_prediction_that_was_interrupted_is_made_again(tmp_path, told, structures, done):
    folder = tmp_path / "x"
    folder.mkdir()
    for i, text in enumerate(structures):
        (folder / f"x_model_{i}.cif").write_text(text)
    if told is not None:
        (folder / "x.json").write_text(told)
    assert completed(tmp_path, "x") == (json.loads(COMPLETE) if done else None)
