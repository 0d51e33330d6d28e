"""A run goes on by its own configuration, from its newest checkpoint that is complete."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cpfold_train.checkpoints.sharded import INDEX, read_index, save_sharded
from cpfold_train.cli import resume as command
from cpfold_train.cli.resume import keys
from cpfold_train.config.effects import EFFECTS, effect
from cpfold_train.config.quoting import hydra_quoted
from cpfold_train.config.recorded import (
    damaged_checkpoints,
    differences,
    newest_checkpoint,
    recorded_beside,
    with_record,
    write_record,
)
from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.record import flattened
from tests.test_config import compose
from tests.test_training_runs import TINY, assert_same_curve, rows_of

CURVES = ("train/loss", "grad_norm", "lr")
STATE = {"state_dict": {}, "optimizer_states": []}


def saved(folder: Path, **steps: int) -> Path:
    """A run directory with checkpoints of so many steps, written in this order."""
    (folder / "checkpoints").mkdir(parents=True)
    for i, (name, step) in enumerate(steps.items()):
        path = folder / "checkpoints" / f"{name.replace('_', '-')}.ckpt"
        torch.save({**STATE, "global_step": step}, path)
        os.utime(path, (i, i))
    return folder


def sharded(path: Path, step: int) -> Path:
    """A checkpoint of a run with FSDP on one rank; returns the directory of its shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.full((4096,), 1.5), init_device_mesh("cpu", (1,)), [Shard(0)])
        save_sharded({**STATE, "state_dict": {"w": weight}, "global_step": step}, path)
    finally:
        dist.destroy_process_group()
    return path / read_index(path)["shards"]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Of a run with other values than the defaults."""
    folder = saved(tmp_path / "a run", last=4)
    write_record(composed("crop_size=48", "optim=af3", "data.crop={spatial: 1.0}", "data.train=[own/*.tar]"), folder)
    return folder


def composed(*typed: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose(*typed), resolve=True)


def resumed(run: Path, *typed: str) -> DictConfig:
    words = [f"resume='{run}'", *typed]
    return with_record(compose(*words), words)


def test_the_record_holds_but_for_what_is_typed(run_dir):
    plain = resumed(run_dir)
    assert (plain.crop_size, plain.optim, plain.data.crop) == (48, compose("optim=af3").optim, {"spatial": 1.0})
    assert (plain.ckpt_path, plain.resume) == (str(run_dir / "checkpoints" / "last.ckpt"), None)
    assert differences(recorded_beside(plain.ckpt_path), plain) == {}
    # The default itself, a whole group, and a mapping of which nothing of the record is left.
    other = resumed(run_dir, "crop_size=96", "optim=quickstart", "optim.lr=0.5", "data.crop={contiguous: 1.0}")
    assert (other.crop_size, other.data.crop, other.optim.lr) == (96, {"contiguous": 1.0}, 0.5)
    assert other.optim == compose("optim.lr=0.5").optim
    changed = differences(recorded_beside(other.ckpt_path), other)
    assert changed["crop_size"] == (48, 96) and changed["data.crop.spatial"] == (1.0, "absent")
    assert set(changed) > {"optim.lr", "data.crop.contiguous"} and "ckpt_path" not in changed


def test_a_configuration_starts_again(run_dir):
    typed = [f"config_from='{run_dir}/resolved.yaml'", "seed=3"]
    config = with_record(compose(*typed), typed)
    assert (config.crop_size, config.seed, config.ckpt_path, config.config_from) == (48, 3, None, None)


def test_a_plain_configuration_stays():
    config = compose("crop_size=48")
    assert with_record(config, ["crop_size=48"]) is config


def test_the_newest_complete_checkpoint(tmp_path):
    run = saved(tmp_path, best_step_2=2, last=4, best_step_6=6)
    folder = run / "checkpoints"
    assert newest_checkpoint(run) == folder / "best-step-6.ckpt"
    whole = (folder / "best-step-6.ckpt").read_bytes()
    (folder / "best-step-6.ckpt").write_bytes(whole[: len(whole) // 2])
    assert newest_checkpoint(run) == folder / "last.ckpt"
    assert damaged_checkpoints(run) == [folder / "best-step-6.ckpt"]
    # One of a run with FSDP, which was killed as it exchanged the file for it.
    sharded(folder / "last.ckpt.new", 5)
    assert newest_checkpoint(run) == folder / "last.ckpt.new"
    (folder / "last.ckpt.new" / INDEX).unlink()
    assert newest_checkpoint(run) == folder / "last.ckpt"


def test_a_course_that_was_left_is_not_gone_on_with(tmp_path):
    """A run that went back to an earlier checkpoint has later ones of its first course."""
    assert newest_checkpoint(saved(tmp_path, best_step_50=50, last=40)).name == "last.ckpt"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_a_disk_has_changed_is_passed_over(tmp_path):
    """One bit of a weight: torch loads it without a word."""
    run = saved(tmp_path, last=4)
    newer = run / "checkpoints" / "best-step-6.ckpt"
    torch.save({**STATE, "state_dict": {"w": torch.full((4096,), 1.5)}, "global_step": 6}, newer)
    assert newest_checkpoint(run) == newer and damaged_checkpoints(run, 4) == []
    flip(newer, newer.read_bytes().index(bytes.fromhex("0000c03f") * 64) + 402)
    changed = torch.load(newer)["state_dict"]["w"]
    assert changed.isfinite().all() and changed.ne(1.5).sum() == 1
    assert newest_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert damaged_checkpoints(run, 4) == [newer] and damaged_checkpoints(run, 6) == []


@pytest.mark.parametrize("part", ["cut", "gone", "changed", "without its table", "whole"])
def test_a_damaged_checkpoint_of_fsdp_is_passed_over(tmp_path, part):
    run = saved(tmp_path, best_step_4=4)
    last = run / "checkpoints" / "last.ckpt"
    shards = sharded(last, 6)
    (file,) = shards.glob("*.distcp")
    if part == "cut":
        file.write_bytes(file.read_bytes()[:9000])
    elif part == "gone":
        file.unlink()
    elif part == "changed":
        flip(file, file.read_bytes().index(bytes.fromhex("0000c03f") * 64) + 402)
    elif part == "without its table":
        (shards / ".metadata").unlink()
    assert newest_checkpoint(run) == (last if part == "whole" else run / "checkpoints" / "best-step-4.ckpt")
    assert damaged_checkpoints(run, 4) == ([] if part == "whole" else [last])


def test_a_record_holds_from_another_directory(tmp_path, monkeypatch):
    """Paths are those of the directory in which the run was started; what is typed now is of this one."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    run = saved(tmp_path / "run", last=4)
    sets = "data.train=[{shards: [own/*.tar], weight: 0.5}, {shards: 'more/a=b.tar'}]"
    given = [sets, "data.val=[own/val-*.tar]", "model.init_from=base.ckpt"]
    write_record(composed(*given), run)
    monkeypatch.chdir(tmp_path)
    config = resumed(run, "data.val=[mine/*.tar]")
    assert config.data.train == [
        {"shards": [f"{tmp_path}/there/own/*.tar"], "weight": 0.5},
        {"shards": f"{tmp_path}/there/more/a=b.tar"},
    ]
    assert config.data.val == ["mine/*.tar"] and config.model.init_from == f"{tmp_path}/there/base.ckpt"
    changed = differences(recorded_beside(config.ckpt_path), config)
    assert changed == {"data.val": ([f"{tmp_path}/there/own/val-*.tar"], [f"{tmp_path}/mine/*.tar"])}
    monkeypatch.chdir(tmp_path / "there")
    assert differences(recorded_beside(config.ckpt_path), compose(*given)) == {}, "the same command"


def test_a_fork_goes_on_in_the_schedule(tmp_path):
    """Also of a run that was told to start its schedule at 0; what is typed beside it holds."""
    run = saved(tmp_path / "run", last=4)
    write_record(composed("optim.start_step=0"), run)
    words = keys(run, str(tmp_path / "fork"))
    assert with_record(compose(*words), words).optim.start_step is None
    words.append("optim.start_step=0")
    assert with_record(compose(*words), words).optim.start_step == 0


def test_of_equally_many_steps_the_last_is_taken(tmp_path):
    assert newest_checkpoint(saved(tmp_path, best_step_4=4, last=4)).name == "last.ckpt"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["recipe=overfit"], "recipe=overfit"),
        (["~data.crop"], "~data.crop"),
        (["config_from=x.yaml"], "config_from"),
    ],
)
def test_what_has_no_meaning_beside_a_record_is_refused(run_dir, typed, told):
    config = compose(*[word for word in typed if word.startswith("config_from")])
    config.resume = str(run_dir)
    with pytest.raises(ConfigError, match=told):
        with_record(config, typed)


def test_records_that_cannot_be_used_are_told(run_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"resolved.yaml does not exist"):
        resumed(tmp_path / "gone")
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*config_from="):
        resumed(run_dir)
    (run_dir / "resolved.yaml").write_text("crop: 3\n")
    with pytest.raises(ConfigError, match="has crop, which is no key"):
        resumed(run_dir)
    (run_dir / "resolved.yaml").write_text("crop: [\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        resumed(run_dir)


def test_the_configuration_of_each_start_is_kept(run_dir):
    first = (run_dir / "resolved.yaml").read_text()
    write_record(composed("crop_size=48"), run_dir)
    write_record(composed("crop_size=48"), run_dir)
    write_record(composed("crop_size=64"), run_dir)
    assert sorted(path.name for path in run_dir.glob("resolved*")) == [
        "resolved.1.yaml", "resolved.2.yaml", "resolved.yaml",
    ]  # fmt: skip
    assert (run_dir / "resolved.1.yaml").read_text() == first
    assert OmegaConf.load(run_dir / "resolved.yaml").crop_size == 64


def test_effects_are_of_keys_that_there_are():
    names = {
        name for key in flattened(OmegaConf.to_container(OmegaConf.structured(TrainConfig))) for name in parents(key)
    }
    assert EFFECTS.keys() <= names
    assert effect("optim.lr").startswith("from the next step on; Adam's") and effect("wandb.name") == "from now on"
    assert effect("finetune.lora.rank").startswith("must be")


def parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


@pytest.mark.parametrize(
    "name", ["plain", "a run", "lr=1e-4", "a,b", "it's", "[x]", "{y: 1}", "a\\b", "a\\", "a\\'b", "100%"]
)
def test_names_of_directories_survive(tmp_path, name):
    run = saved(tmp_path / name, last=1)
    parser = OverridesParser.create()
    values = {parsed.key_or_group: parsed.value() for parsed in map(parser.parse_override, keys(run, None))}
    assert values == {"resume": str(run)}
    forked_run = {parsed.key_or_group: parsed.value() for parsed in map(parser.parse_override, keys(run, name))}
    assert forked_run["ckpt_path"] == str(run / "checkpoints" / "last.ckpt")
    assert (forked_run["config_from"], forked_run["hydra.run.dir"]) == (str(run / "resolved.yaml"), name)


def test_a_key_after_fork_is_no_directory(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(command, "newest_checkpoint", lambda run_dir: run_dir / "last.ckpt")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_intermixed_args(["run", "--fork", "trainer.max_steps=9"]))
    assert started[0][-1] == "trainer.max_steps=9" and not any("hydra.run.dir" in word for word in started[0])
    with pytest.raises(ConfigError, match="other is no KEY=VALUE"):
        command.run(parser.parse_intermixed_args(["run", "other"]))


@pytest.mark.slow
def test_a_run_goes_on_and_is_repeated(forked_runs, tmp_path):
    """A resumed run has the curve of the whole one, on another grid, past a damaged checkpoint; so has a fork, and one
    by the record alone."""

    def run(ranks: int, run_dir: Path, *words: str) -> list[dict[str, str]]:
        return rows_of(forked_runs.run(ranks, list(words)), run_dir)

    whole = run(1, tmp_path / "whole", *TINY, "cp.grid=1x1", f"hydra.run.dir='{tmp_path}/whole'")
    stopped = tmp_path / "it's a=run"
    of_it = f"hydra.run.dir={hydra_quoted(stopped)}"
    run(1, stopped, *TINY, "cp.grid=1x1", "trainer.max_steps=2", of_it)
    shutil.copytree(stopped, tmp_path / "other")
    newer = stopped / "checkpoints" / "best-step-3.ckpt"
    newer.write_bytes((stopped / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    assert not zipfile.is_zipfile(newer)
    rows = run(2, stopped, *keys(stopped, None), "cp.grid=1x2", "trainer.max_steps=4")
    assert_same_curve(rows, whole, *CURVES)
    assert OmegaConf.load(stopped / "resolved.1.yaml").trainer.max_steps == 2
    assert OmegaConf.load(stopped / "resolved.yaml").cp.grid == "1x2"
    fork = run(1, tmp_path / "fork", *keys(tmp_path / "other", str(tmp_path / "fork")), "trainer.max_steps=4")
    assert_same_curve(fork, whole[-len(fork) :], *CURVES)
    assert read_metrics(tmp_path / "other" / "metrics.csv")[-1]["step"] == "2"
    again = f"config_from='{tmp_path}/whole/resolved.yaml'", f"hydra.run.dir='{tmp_path}/again'"
    assert_same_curve(run(1, tmp_path / "again", *again), whole, *CURVES)
