"""The commands as functions: objects with the metrics, and exceptions instead of exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.trainer.connectors import accelerator_connector

from cpfold_train import api
from cpfold_train.errors import ConfigError, RunError
from cpfold_train.training.launcher import RankLauncher
from cpfold_train.training.strategy import GridStrategy


def test_compose():
    config = api.compose("crop_size=48", "cp.grid=1x2", "ckpt_path=last")
    assert (config.crop_size, config.cp.grid, config.ckpt_path) == (48, "1x2", "last")
    with pytest.raises(ConfigError, match="did you mean crop_size"):
        api.compose("crop_sise=48")
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        api.compose("optim.lr=-1")


def test_samples():
    assert [sample.key for sample in api.samples("tests/data")] == ["3l4q", "4hhb", "7pzb"]


def test_metrics_of_a_run(tmp_path):
    run = api.Run(tmp_path)
    assert run.result == {} and run.columns == []
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n0,,7.5\n1,6.5,\n2,6.0,7.0\n")
    assert run.columns == ["step", "train/loss", "val/loss"]
    assert run.metrics("val/loss") == {0: 7.5, 2: 7.0} and run.metrics("train/loss") == {1: 6.5, 2: 6.0}
    with pytest.raises(ConfigError, match="no metric loss: it has step, train/loss, val/loss"):
        run.metrics("loss")


def test_options_are_those_of_the_commands():
    given = {"max_msa_rows": 8, "overwrite": True, "id": ["a", "b"], "msa": None, "crop": False, "out": Path("x y")}
    assert api._typed(given) == ["--max-msa-rows", "8", "--overwrite", "--id", "a", "--id", "b", "--out", "x y"]


def test_exit_codes_are_exceptions(capfd):
    def ends(code: int, *lines: str) -> list[str]:
        return [sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit({code})"]

    api._stream(ends(0, "fine"))
    assert capfd.readouterr().out == "fine\n"
    with pytest.raises(ConfigError, match=r"^crop_size=0: type 1$"):
        api._stream(ends(2, "note: x", "error: crop_size=0: type 1"))
    with pytest.raises(RunError, match=r"^rank 1 failed$"):
        api._stream(ends(1, "error: rank 1 failed"))
    with pytest.raises(RunError, match="exit code 7"):
        api._stream(ends(7))
    with pytest.raises(KeyboardInterrupt):
        api._stream(ends(130))


def test_a_notebook_runs_one_rank_and_is_told_of_several(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    one = pl.Trainer(accelerator="cpu", devices=1, strategy=GridStrategy(1, 1), logger=False)
    assert isinstance(one.strategy.launcher, RankLauncher)
    with pytest.raises(ConfigError, match="2 ranks cannot be started from a notebook"):
        pl.Trainer(accelerator="cpu", devices=2, strategy=GridStrategy(1, 2), logger=False)
