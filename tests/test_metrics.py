"""The registry of metrics, and that what reads it says the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

from cpfold_train.config.schema import CONFIDENCE, LossConfig
from cpfold_train.reports.metrics import METRICS, VALIDATION, charts, measured, progress_bar


def test_every_loss_has_its_metric():
    losses = {f"train/{field.name}" for field in fields(LossConfig)}
    assert {name for name in METRICS if name.startswith("train/")} == losses | {"train/loss"}
    assert {name for name in VALIDATION if METRICS[name].needs == "confidence"} == {f"val/{x}" for x in CONFIDENCE}


def test_validation_is_in_the_order_in_which_the_module_measures():
    scores = "val/contact_precision", "val/distance_lddt", "val/structure_lddt"
    assert ("val/loss", "val/distogram", *scores, *(f"val/{name}" for name in CONFIDENCE)) == VALIDATION


def test_what_validation_has():
    assert measured(sampled=True, trains_confidence=True) == [*VALIDATION]
    assert "val/structure_lddt" in measured(sampled=True, trains_confidence=False)
    assert measured(sampled=False, trains_confidence=True) == [*VALIDATION[:4]]


def test_what_can_be_monitored_can_improve():
    assert all(METRICS[name].better in ("min", "max") for name in VALIDATION)


def test_where_metrics_are_shown():
    assert progress_bar({"train/loss": 1, "step_s": 2, "lr": 3}) == {"loss": 1.0, "s/step": 2.0}
    assert charts() == {"loss": ["train/loss", "val/loss"], "scores": ["val/contact_precision", "val/distance_lddt"]}


def test_reports_need_no_lightning():
    """Reading and comparing runs starts at once."""
    code = (
        "import sys, cpfold_train.reports.compare, cpfold_train.reports.distances; print({*sys.modules} & {*sys.argv})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "torch", "lightning"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
