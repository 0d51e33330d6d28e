"""What a plan says on the terminal: units, whole names, what to type, and the file that says the same."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import hydra
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from cpfold_train.__main__ import main
from cpfold_train.config.compose import compose
from cpfold_train.config.composition import register
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.paths import CONF
from cpfold_train.plan import measure, plan, report
from cpfold_train.plan.command import command_of, settings_of, write_config
from cpfold_train.plan.units import size_text, time_text
from cpfold_train.simulate.work_counter import WorkCounter
from tests.test_plan import CHOSEN, TINY

MEMORY = MemoryConfig(offload=True, keep_attention=False, recompute_updates=True, chunk_mib=64.0)
ON_GPU = "trainer.accelerator=gpu"
CHANGED = ["memory.recompute_updates=true", "memory.offload=true", "memory.keep_attention=false", "memory.chunk_mib=64"]


def planned(grid: Grid, device: str = "h100-80gb", settings: tuple[str, ...] = ()) -> plan.Plan:
    costs = SimpleNamespace(work=WorkCounter(), step_s=9801.0)
    config = replace(compose([*settings]), memory=MEMORY)
    return plan.Plan(config, grid, device, 1, {("activations", "trunk"): 44.1e9}, "trunk", costs, 80e9, CHOSEN)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.00451, "4.51 ms"), (24.4521, "24.5 s"), (119.99, "120 s"), (433, "7.22 min"), (9801, "2.72 h")],
)
def test_times_are_in_units_that_fit(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (512, "0.50 KiB"), (1000 * 2**20, "0.98 GiB"), (41.0678 * 2**30, "41.1 GiB")]
)
def test_sizes_are_in_units_that_fit(size, text):
    assert size_text(size) == text


def test_a_plan_is_run_with_its_grid_and_memory_options():
    typed = ["recipe=quickstart", "cp.grid=auto", "gpus=8", "device=h200-141gb", "dp=2", "memory=auto", "data.val=[]"]
    found = planned(Grid(2, 2, 2))
    assert settings_of(found, typed) == ["recipe=quickstart", "data.val=[]", ON_GPU, "cp.grid=2x2", "dp=2", *CHANGED]
    assert command_of(found, typed).startswith(f"python train.py recipe=quickstart 'data.val=[]' {ON_GPU} cp.grid=2x2")
    assert command_of(planned(Grid(4, 4)), typed).startswith("torchrun --nnodes 2 --nproc-per-node 8 --node-rank RANK")


@pytest.mark.parametrize("recipe", ["finetune_boltz2_large_crop", "quickstart"])
def test_what_is_written_composes_to_what_was_planned(tmp_path, recipe):
    typed = [f"recipe={recipe}", "data.crop_schedule=null", "cp.grid=auto", "gpus=8", "data.val=[]"]
    found, file = planned(Grid(2, 4), settings=("model=boltz2",)), tmp_path / "mine.yaml"
    assert write_config(found, typed, file) == f"python train.py --config-dir {tmp_path} --config-name mine"
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        wanted = hydra.compose("train", settings_of(found, typed))
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        # As --config-dir does for the other of the two directories.
        written = hydra.compose("mine", [f"hydra.searchpath=[file://{CONF}]"])
    assert OmegaConf.to_container(written) == OmegaConf.to_container(wanted)
    assert written.memory.chunk_mib == 64 and written.cp.grid == "2x4"
    with pytest.raises(ConfigError, match=r"--write .*mine\.yaml"):
        write_config(found, typed, tmp_path / "mine")


@pytest.mark.slow
def test_a_run_starts_from_what_is_written(forked_runs, tmp_path):
    file = tmp_path / "mine.yaml"
    run = [*TINY, "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
    assert main(["plan", *run, "device=cpu", "gpus=1", "cp.grid=auto", "--write", str(file)]) == 0
    from_file = ["--config-dir", str(tmp_path), "--config-name", "mine", f"hydra.run.dir={tmp_path / 'run'}"]
    done = forked_runs.run(1, from_file)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.load(tmp_path / "run" / "resolved.yaml").memory.recompute is False


def test_names_of_memory_options_are_whole_in_80_columns(monkeypatch, capsys):
    out = io.StringIO()
    monkeypatch.setattr(report, "Console", lambda: Console(file=out, width=80))
    report.show_proposals([planned(Grid(2, 4, 1))], "h100-80gb", 3072, 8, "python train.py")
    lines = out.getvalue().splitlines()
    assert all(any(option in line for line in lines) for option in CHANGED)
    assert "2x4   1     8" in out.getvalue() and "2.72 h" in out.getvalue() and "41.1 GiB" in out.getvalue()
    assert max(map(len, lines)) <= 80
    assert capsys.readouterr().out.endswith("    python train.py\n")


def test_what_the_process_takes_counts_on_cpu():
    assert 2**28 < plan.process_bytes() < 2**33 and plan.process_bytes() == plan.process_bytes()
    found = replace(planned(Grid()), memory=50e9)
    assert found.fits and not replace(found, process=2e9).fits


def test_no_shards_are_needed_and_relative_paths_are_those_of_the_shell(monkeypatch):
    assert compose(["data.train=[nowhere/*.tar]", "data.val=[nowhere/*.tar]"]).crop_size == 96
    given = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        given.append(options.get("cwd"))
        return SimpleNamespace(returncode=1, stderr="error: it ends")

    monkeypatch.setattr(measure.subprocess, "run", run)
    with pytest.raises(ConfigError, match="it ends"):
        measure.run_once(["data.train=[shards/*.tar]"], give_back=False)
    assert given == [None]
