"""Every key of ``conf/trainer`` at its extremes works, or is refused in one sentence."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpfold_train.cli.run import _module
from cpfold_train.cli.train import start
from cpfold_train.config.check import check, count_samples, wandb_switched_off
from cpfold_train.config.check_batches import check_batches
from cpfold_train.config.composition import explain, typed_config
from cpfold_train.config.quoting import hydra_quoted
from cpfold_train.config.schema import TrainConfig, TrainerConfig
from cpfold_train.config.world import check_machines, plan_world
from cpfold_train.data.stream.shards import read_indices
from cpfold_train.errors import ConfigError
from cpfold_train.training.max_time import MaxTime
from cpfold_train.training.precision import precision_arguments
from tests.test_config import compose
from tests.test_faults import SMALL
from tests.test_training_runs import ROOT

EXTREMES = [0, -1, None, 0.0, 1e-9, 1.5, 10**12, math.nan, "text", True, [1]]
KEYS = [field.name for field in dataclasses.fields(TrainerConfig)]


@cache
def base() -> DictConfig:
    return compose("cp.grid=1x1")


@cache
def base_config() -> TrainConfig:
    return typed_config(base())


def refusal(**trainer: object) -> str | None:
    """What a run with these keys of ``trainer`` is refused with before any process is started."""
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(base().trainer, OmegaConf.create(trainer)))
        start_up(dataclasses.replace(base_config(), trainer=typed))
    except ConfigError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return explain(error)
    return None


def start_up(config: TrainConfig) -> None:
    """What a run does before it starts processes, and the trainer that it makes."""
    check(config)
    samples = count_samples(config)
    check_machines(config.trainer.num_nodes, {})
    world = plan_world(config.cp.grid, config.dp, config.trainer.num_nodes, config.trainer.accelerator, {})
    check_batches(config, *samples, world.grid.dp)
    arguments = dataclasses.asdict(config.trainer) | precision_arguments(config.trainer)
    pl.Trainer(**arguments, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("key", KEYS)
def test_extremes_work_or_are_refused_in_one_sentence(key):
    told = {repr(value): refusal(**{key: value}) for value in EXTREMES}
    for value, sentence in told.items():
        if sentence is None:
            continue
        assert ": type " in sentence, (value, sentence)
        assert key in sentence or "nodes" in sentence
        assert "\n" not in sentence
    assert any(told.values()), "nothing was refused"


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"val_check_interval": 0.5}, "type trainer.check_val_every_n_epoch=1"),
        ({"val_check_interval": None}, "type trainer.check_val_every_n_epoch=1"),
        ({"check_val_every_n_epoch": 1}, "type trainer.val_check_interval=1.0"),
        ({"check_val_every_n_epoch": 1, "limit_train_batches": 3, "val_check_interval": 4}, "the 3 batches"),
        ({"limit_val_batches": 0.001}, "is less than one"),
        ({"limit_train_batches": 0.001}, "is less than one"),
        ({"limit_train_batches": 0}, "type for example trainer.limit_train_batches=100"),
        ({"val_check_interval": 0}, "type for example trainer.val_check_interval=50"),
        ({"max_time": "1:00"}, "type for example trainer.max_time=00:23:30:00"),
        ({"num_nodes": 2}, "type NODE_RANK="),
    ],
)
def test_combinations_that_cannot_be(trainer, words):
    assert words in (refusal(**trainer) or "")


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 0.5, "check_val_every_n_epoch": 1},
        {"val_check_interval": 1.0, "check_val_every_n_epoch": 2},
        {"val_check_interval": None, "check_val_every_n_epoch": 1},
        {"check_val_every_n_epoch": 1, "limit_val_batches": 0},
        {"limit_val_batches": 1.0, "limit_train_batches": 1},
        {"max_time": "00:00:00:00"},
        {"max_time": "99999:23:59:59"},
        {"fast_dev_run": 2, "limit_train_batches": 1e-9},
    ],
)
def test_combinations_that_can_be(trainer):
    assert refusal(**trainer) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        "max_steps=0",
        "max_epochs=0",
        "max_steps=1 min_steps=1000000000000",
        "max_epochs=null",
        "max_epochs=1 max_steps=-1 min_epochs=0",
        "max_time=00:00:00:00",
        "fast_dev_run=2",
        "fast_dev_run=1 val_check_interval=0.5 check_val_every_n_epoch=1",
        "limit_train_batches=0.3",
        "limit_val_batches=0",
        "limit_val_batches=1.0",
        "val_check_interval=1000000000000",
        "val_check_interval=0.5 check_val_every_n_epoch=1",
        "val_check_interval=null check_val_every_n_epoch=2",
        "num_sanity_val_steps=null",
        "num_sanity_val_steps=1000000000000",
        "log_every_n_steps=1000000000000",
        "enable_progress_bar=true",
        "enable_model_summary=true",
        "accumulate_grad_batches=1000000000000",
        "gradient_clip_val=null",
        "gradient_clip_val=0 gradient_clip_algorithm=value",
        "gradient_clip_val=inf gradient_clip_algorithm=null",
        "gradient_clip_val=1e-9 gradient_clip_algorithm=value",
        "deterministic=true",
        "deterministic=warn benchmark=true",
        "inference_mode=false",
        "profiler=simple",
        "profiler=advanced",
        "profiler=pytorch",
        "detect_anomaly=true",
        "detect_anomaly=true parallel.fsdp=true",
        "gradient_clip_algorithm=value gradient_clip_val=1 parallel.fsdp=true",
        "fast_dev_run=true parallel.fsdp=true",
    ],
)
def test_what_is_not_refused_runs(forked_runs, tmp_path, keys):
    """On two ranks."""
    trainer = [key if key.startswith("parallel.") else f"trainer.{key}" for key in keys.split()]
    given = [*SMALL, "data.val=[tests/data/*.tar]", "cp.grid=1x2", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}"]
    process = forked_runs.run(2, [*given, *trainer])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Traceback" not in process.stderr


def test_max_time_is_of_all_starts():
    """A start that has what an earlier one took stops at once, and says what to type."""
    used, left = MaxTime("00:00:00:07"), MaxTime("00:00:00:08")
    for timer in used, left:
        timer.load_state_dict({"time_elapsed": {"train": 7.0}})
        trainer = SimpleNamespace(should_stop=False, is_global_zero=True, global_step=3)
        trainer.strategy = SimpleNamespace(broadcast=lambda x: x)
        timer.on_fit_start(trainer)
        assert trainer.should_stop is (timer is used)
    assert "trainer.max_time=00:00:00:07 is over" in used.reason(3) and left.reason(3) == ""


@pytest.mark.parametrize(
    ("env", "off"),
    [
        ({"WANDB_MODE": "disabled"}, "WANDB_MODE=disabled"),
        ({"WANDB_DISABLED": "true"}, "WANDB_DISABLED=true"),
        ({"WANDB_DISABLED": "false"}, None),
        ({"WANDB_MODE": "offline"}, None),
        ({}, None),
    ],
)
def test_wandb_is_switched_off_by_its_own_variables(monkeypatch, env, off):
    assert wandb_switched_off(env) == off
    config = typed_config(OmegaConf.merge(base(), {"wandb": {"enabled": True}}))
    monkeypatch.setattr("cpfold_train.config.check.find_spec", lambda name: None)
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if off:
        check(config)
    else:
        with pytest.raises(ConfigError, match="pip install"):
            check(config)


@pytest.mark.parametrize(("mode", "enabled"), [("disabled", False), ("offline", True)])
def test_a_run_does_and_says_what_the_variable_of_wandb_asks_for(monkeypatch, capsys, tmp_path, mode, enabled):
    started = []
    monkeypatch.setattr("cpfold_train.cli.train._run", lambda typed, *rest: started.append(typed))
    monkeypatch.setenv("WANDB_MODE", mode)
    start(OmegaConf.merge(base(), {"wandb": {"enabled": True}}), tmp_path / "run")
    assert started[0].wandb.enabled is enabled
    assert f"WANDB_MODE={mode}" in capsys.readouterr().err


def test_a_model_that_finds_no_memory_is_told(monkeypatch):
    def prepare(config: TrainConfig) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes")

    monkeypatch.setattr("cpfold_train.cli.run.prepare_module", prepare)
    with pytest.raises(ConfigError, match="type smaller ones"):
        _module(base_config())


@pytest.mark.parametrize("path", ["a=b", "it's", "a[x]", "a(1)", "a;b&c", 'a"b', "a b=c", "a-{x}", "a,b"])
def test_a_path_that_hydra_misreads_is_told_how_to_quote(path):
    """What it says, typed in a shell, is the path; of shards it is a list of one, or of two."""
    for key, value in ("ckpt_path", path), ("data.val", path.split(",")):
        with pytest.raises((HydraException, OmegaConfBaseException)) as error:
            parsed(f"{key}={path}")
        (typed,) = shlex.split(explain(error.value).rpartition(": type ")[2])
        assert parsed(typed) == value


def parsed(override: str) -> object:
    """The value of an override, without composing all."""
    (found,) = OverridesParser.create().parse_overrides([override])
    if found.is_sweep_override():
        raise ConfigCompositionException(f"Ambiguous value for argument '{override}'")
    return found.value()


def test_a_value_or_a_key_that_is_missing(monkeypatch, capsys):
    with pytest.raises(HydraException) as error:
        compose("crop_size")
    assert explain(error.value) == "crop_size has no value: type crop_size=VALUE"


def test_shards_below_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "set [1]=a,b"
    folder.mkdir()
    (shard,) = Path("tests/data").glob("*.tar")
    (folder / "train-000000.tar").symlink_to(shard.resolve())
    assert read_indices([f"{folder}/train-*.tar"])


@pytest.mark.slow
def test_a_run_in_a_directory_with_a_name_of_all_kinds(tmp_path):
    """With ranks of its own, which get the name on their command line; then on from its checkpoint."""
    run_dir = tmp_path / "it's a=b, [x] {y} #1;&"
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "cp.grid=1x2", "data.val=[]"]
    command += [f"hydra.run.dir={hydra_quoted(run_dir)}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    on = f"ckpt_path={hydra_quoted(run_dir / 'checkpoints' / 'last.ckpt')}"
    for given in (["trainer.max_steps=1"], ["trainer.max_steps=2", on]):
        done = subprocess.run([*command, *given], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len((run_dir / "metrics.csv").read_text().splitlines()) == 3
