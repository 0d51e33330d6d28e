"""What is done to a run and what is left of it, with real processes; docs/faults.md has the table."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed import TCPStore

from cpfold_train.checkpoints.lightning_io import WholeCheckpointIO
from cpfold_train.checkpoints.sharded import INDEX, load_sharded, remove_unfinished
from cpfold_train.cli.sweep import run_job
from cpfold_train.errors import DiskFullError
from cpfold_train.faults.restart import AutoRestart
from cpfold_train.training.launcher import RankLauncher
from cpfold_train.training.save_last import SaveLast
from cpfold_train.training.signals import SaveOnSigterm
from cpfold_train.whole_file import PARTIAL, remove_partial_files
from tests.test_training_runs import ROOT, TINY

SMALL = [
    *TINY,
    "crop_size=16",
    "data.num_workers=0",
    "diffusion.multiplicity=1",
    "loss.plddt=0",
    "loss.resolved=0",
    "loss.pde=0",
    "loss.pae=0",
    "checkpoint.every_n_steps=1",
]
"""Two micro-batches a step, two steps an epoch, validation after each epoch, four steps."""
ENDS_WITHIN = 30
"""Seconds from the fault to the end of the last rank."""


@pytest.fixture
def run(forked_runs, tmp_path):
    """A run on so many ranks with something wrong in it, one of :mod:`tests.faulty`."""

    def start(ranks: int, fault: str | None, *arguments: str, run_dir: Path = tmp_path) -> subprocess.CompletedProcess:
        main = f"tests.faulty:{fault}" if fault else "cpfold_train.cli.train:main"
        arguments = [*SMALL, f"cp.grid=1x{ranks}", f"hydra.run.dir={run_dir}", *arguments]
        return forked_runs.run(ranks, arguments, main)

    return start


def own_ranks(fault: str, run_dir: Path, *arguments: str) -> subprocess.Popen:
    """A run that starts its two ranks itself, as ``python train.py`` does, with one of :mod:`tests.faulty`."""
    command = [sys.executable, "-m", "tests.faulty", *SMALL, "cp.grid=1x2", f"hydra.run.dir={run_dir}", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def assert_no_process_is_left(run_dir: Path) -> None:
    """Data workers look every five seconds whether their rank is still there."""
    deadline = time.monotonic() + 15
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.2)


def assert_same_rows(rows: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """The same steps with the same figures, whatever the grid."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        for name in ("train/loss", "grad_norm", "lr", "val/loss", "tokens", "skipped"):
            assert bool(row[name]) == bool(other[name]), (row["step"], name)
            if row[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-8, nan_ok=True)


def rows_of(run_dir: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run_dir / name).open() as file:
        return list(csv.DictReader(file))


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def last_checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=False)


def moments_of(checkpoint: dict) -> set[float]:
    """How many steps the optimizer has made for its parameters."""
    return {float(moment["step"]) for moment in checkpoint["optimizer_states"][0]["state"].values()}


def since_last_checkpoint(run_dir: Path) -> float:
    return time.time() - (run_dir / "checkpoints" / "last.ckpt").stat().st_mtime


def test_an_exception_on_one_rank(run, tmp_path):
    process = run(2, "exception", "data.val=[]")
    assert since_last_checkpoint(tmp_path) < ENDS_WITHIN
    assert process.returncode == 1
    assert process.stderr.count("Traceback (most recent call last)") == 1, "that of the rank that failed"
    assert "\nArithmeticError: a fault on one rank" in process.stderr
    assert re.search("error: rank 1 .*ArithmeticError: a fault on one rank", process.stderr)
    assert last_checkpoint(tmp_path)["global_step"] == 2
    assert re.fullmatch("rank 1 .*ArithmeticError: a fault on one rank", result_of(tmp_path)["error"])


def test_a_killed_rank(run, tmp_path):
    process = run(2, "killed", "data.val=[]")
    assert since_last_checkpoint(tmp_path) < ENDS_WITHIN
    assert process.returncode != 0
    assert re.search(r"error: rank 0 .*\d+ s .*rank 1 .*\d+ s", process.stderr)
    assert last_checkpoint(tmp_path)["global_step"] == 2


@pytest.mark.slow
def test_a_rank_that_does_not_answer(run, tmp_path):
    process = run(2, "stopped", "data.val=[]", "cp.timeout_s=10")
    assert process.returncode != 0
    told = re.search(r"rank 0 waited (\d+) s in (.+); rank 1 holds it up: it is after (.+) for (\d+) s", process.stderr)
    assert told, process.stderr
    assert told[2] in ("window_attention", "atom_tokens")
    assert 10 <= int(told[1]) <= int(told[4]) + 1
    assert last_checkpoint(tmp_path)["global_step"] == 2


@pytest.mark.slow
def test_a_rank_that_gets_sigstop(tmp_path):
    """Rank 0 names it, for about as long as it has been stopped, and kills it."""
    process = own_ranks("frozen", tmp_path, "data.val=[]", "data.num_workers=1", "cp.timeout_s=10")
    _, told = process.communicate(timeout=200)
    # Of the step before, just after which rank 1 is stopped.
    stopped_s = since_last_checkpoint(tmp_path)
    assert process.returncode == 1, told
    gone = r"for a rank that has stopped or is gone: there is no sign of rank 1 for (\d+) s, last seen (?:in|after) "
    waited_s, silent_s = map(int, re.search(r"error: rank 0 waited (\d+) s in .+ " + gone, told).groups())
    assert 10 <= waited_s <= silent_s + 1 and silent_s <= stopped_s + 2
    assert stopped_s < 10 + ENDS_WITHIN
    assert "Traceback" not in told
    assert last_checkpoint(tmp_path)["global_step"] == 2
    assert_no_process_is_left(tmp_path)


def test_out_of_memory_on_one_rank(run, tmp_path):
    """Under a launcher the run ends; started again, it skips the step, and loses nothing else."""
    process = run(2, "out_of_memory", "data.val=[]")
    assert since_last_checkpoint(tmp_path) < ENDS_WITHIN
    assert process.returncode == 1
    assert re.search("error: rank 1 .*out of memory.* ckpt_path=last", process.stderr)
    assert "Traceback" not in process.stderr
    assert last_checkpoint(tmp_path)["global_step"] == 2
    process = run(2, "out_of_memory", "data.val=[]", "ckpt_path=last")
    assert process.returncode == 0, process.stderr
    assert re.search(f"step 3 .*{re.escape(str(tmp_path))}/out_of_memory.txt", process.stderr)
    assert [row["skipped"] for row in rows_of(tmp_path)] == ["0", "0", "1", "1"]
    assert moments_of(last_checkpoint(tmp_path)) == {3.0}, "three of four steps were made"


@pytest.mark.slow
def test_out_of_memory_starts_again_by_itself(run, tmp_path):
    """One command, which ends as a run that skips this step from its beginning on one rank; nothing of the failed ranks
    is left to the new ones."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    (whole / "out_of_memory.txt").write_text("3\n")
    assert run(1, None, run_dir=whole).returncode == 0
    process = own_ranks("out_of_memory", parts, "data.num_workers=1")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    last = parts / "checkpoints" / "last.ckpt"
    assert len(re.findall(f"step 3: .*{re.escape(str(last))}", told)) == 1, told
    first, second = re.findall("starts with .*", told)
    assert first == second and "starts with 0 children" in first and first.endswith("variables []")
    assert re.search("step 3 .*memory", told)
    assert "rror" not in told
    result = result_of(parts)
    assert (result["status"], result["steps"], result["skipped"]) == ("completed", 4, 1)
    assert [row["step"] for row in rows_of(parts)] == ["0", "1", "2", "3", "4"]
    assert_same_rows(rows_of(parts), rows_of(whole))
    assert moments_of(last_checkpoint(parts)) == {3.0}, "three of four steps were made"
    assert_no_process_is_left(parts)


@pytest.mark.slow
def test_out_of_memory_does_not_start_again_in_vain(tmp_path):
    """Rank 1 has no memory for the first step, and none again where it is to be skipped: that ends the run."""
    process = own_ranks("out_of_memory_always", tmp_path, "data.val=[]")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 1, told
    assert told.count("for step 1: ") == 1, told
    assert len(re.findall("error: rank 1 .*out of memory", told)) == 1
    assert result_of(tmp_path)["status"] == "failed"
    assert_no_process_is_left(tmp_path)


@pytest.mark.slow
def test_out_of_memory_while_rank_0_does_not_answer(tmp_path):
    """The watch of rank 0 ends it, and starts the run again."""
    process = own_ranks("out_of_memory_unnoticed", tmp_path, "data.val=[]", "data.num_workers=1")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert re.search("rank 0 .*rank 1 .*out of memory", told)
    assert len(re.findall(r"for step \d+: ", told)) == 1
    first, second = re.findall("starts with .*", told)
    assert first == second
    assert (result_of(tmp_path)["steps"], result_of(tmp_path)["skipped"]) == (4, 1)
    assert_no_process_is_left(tmp_path)


@pytest.mark.slow
def test_out_of_memory_in_a_job_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "out_of_memory")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    loss = run_job(
        [sys.executable, str(ROOT / "tests" / "faulty.py")], [*SMALL, "cp.grid=1x2", "data.val=[]"], tmp_path
    )
    assert json.loads((tmp_path / "job.json").read_text())["exit_code"] == 0
    assert loss == float(rows_of(tmp_path)[-1]["train/loss"])
    assert [row["skipped"] for row in rows_of(tmp_path)] == ["0", "0", "1", "1"]


SAVES_FIRST = """
import signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path("saved").touch()))
Path("started").touch()
time.sleep(60)
"""


def test_a_sweep_that_is_to_end_ends_its_job_first(tmp_path):
    (tmp_path / "train.py").write_text(SAVES_FIRST)
    code = "import sys; from pathlib import Path; from cpfold_train.cli.sweep import run_job; "
    code += "run_job([sys.executable, 'train.py'], [], Path('job'))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env) as sweep:
        while not (tmp_path / "started").exists():
            time.sleep(0.1)
        sweep.terminate()
        assert sweep.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_out_of_memory_counts_against_the_limit(tmp_path):
    process = own_ranks("out_of_memory", tmp_path, "data.val=[]", "faults.max_skipped=0")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 1, told
    assert len(re.findall(r"for step \d+: ", told)) == 1
    assert re.search("error: 1 of the last 100 .*step 3.*memory", told)


def test_the_port_of_the_ranks_is_held_before_they_are_started(monkeypatch):
    """Nobody can take it between its choice and the start of rank 0, which shares it."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "MASTER_PORT"})
    environment = LightningEnvironment()
    launcher = RankLauncher(environment, 2, 1)

    def start() -> None:
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", environment.main_port))
        launcher.procs = []

    launcher.start_ranks = start

    def rank_0() -> str:
        launcher._meeting_point.set("from", "launcher")
        store = TCPStore("127.0.0.1", environment.main_port, is_master=True, multi_tenant=True, wait_for_workers=False)
        return store.get("from").decode()

    assert launcher.launch(rank_0) == "launcher"


@pytest.fixture
def typed_again(tmp_path, monkeypatch):
    """What would be typed after an event in a run in ``tmp_path``: arguments and environment, or None."""
    monkeypatch.setattr("os.execve", lambda program, command, env: typed.append((command[1:], env)))
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py", "crop_size=16", "--config-name", "train"])
    monkeypatch.setattr(AutoRestart, "_end_children", lambda self: None)
    typed: list[tuple[list[str], dict[str, str]]] = []

    def after(event: Callable[[AutoRestart], object]) -> tuple[list[str], dict[str, str]] | None:
        typed.clear()
        again = AutoRestart(tmp_path)
        event(again)
        again.after_out_of_memory()
        return typed[0] if typed else None

    return after


def test_what_starts_again(typed_again, tmp_path, monkeypatch):
    """A new step without memory does; the checkpoint of another run in the directory is not what it goes on from."""
    noted, last = tmp_path / "out_of_memory.txt", tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    fresh, options = ["train.py", "crop_size=16", f"hydra.run.dir='{tmp_path}'"], ["--config-name", "train"]
    assert typed_again(lambda again: None) is None
    command, env = typed_again(lambda again: (noted.write_text("3\n"), monkeypatch.setenv("MASTER_PORT", "1")))
    assert command == [*fresh, *options] and "MASTER_PORT" not in env
    assert typed_again(lambda again: noted.write_text("3\n3\n")) is None, "it was to be skipped"
    command, _ = typed_again(lambda again: (noted.write_text("3\n5\n"), os.utime(last, (1, 1))))
    assert command == [*fresh, f"ckpt_path='{last}'", *options]
    asked = SaveOnSigterm(SaveLast(last, 1), None)

    def sigterm(again: AutoRestart) -> None:
        asked._again = again
        asked._note(signal.SIGTERM, None)
        noted.write_text("3\n5\n7\n")

    assert typed_again(sigterm) is None, "somebody has asked the run to end"


def test_cleaning_a_sharded_checkpoint_does_not_make_it_one_of_this_start(typed_again, tmp_path):
    """It is a directory, which has changed when what a killed run had left in it is removed."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    (last / "shards-0").mkdir(parents=True)
    torch.save({"shards": "shards-1"}, last / INDEX)

    def out_of_memory(again: AutoRestart) -> None:
        remove_unfinished(last.parent)
        (tmp_path / "out_of_memory.txt").write_text("3\n")

    command, _ = typed_again(out_of_memory)
    assert not any(word.startswith("ckpt_path") for word in command)
    assert not (last / "shards-0").exists()


def test_a_loss_that_is_not_finite_on_one_rank(run, tmp_path):
    process = run(2, "not_finite", "data.val=[]")
    assert process.returncode == 0, process.stderr
    assert re.search(r"step 2 .*rank 1 .*\(1 of the last 100 ", process.stderr)
    assert [row["skipped"] for row in rows_of(tmp_path)] == ["0", "1", "2", "2"]
    result = result_of(tmp_path)
    assert (result["steps"], result["skipped"], len(result["last_losses"])) == (4, 2, 2)
    checkpoint = last_checkpoint(tmp_path)
    assert moments_of(checkpoint) == {2.0}, "two of four steps were made"
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_a_gradient_that_is_not_finite_is_named(run, tmp_path):
    """In modules.csv, though the step is skipped; nothing moved in that step."""
    process = run(2, "bad_gradient", "data.val=[]", "trainer.max_steps=3", "module_statistics.every_n_steps=1")
    assert process.returncode == 0, process.stderr
    assert re.search("step 2 .*gradient", process.stderr)
    rows = rows_of(tmp_path, "modules.csv")
    named = {(row["step"], row["module"], row["non_finite"]) for row in rows if row["non_finite"]}
    assert named == {("2", "msa_module", "msa_module.msa_proj.weight")}
    for step, moved in (("1", True), ("2", False), ("3", True)):
        ratios = {row["module"]: float(row["update_ratio"]) for row in rows if row["step"] == step}
        assert len(ratios) > 5
        assert (ratios["msa_module"] > 0, any(ratios.values())) == (moved, moved), step


def test_too_many_losses_that_are_not_finite(run, tmp_path):
    process = run(2, "not_finite", "data.val=[]", "faults.max_skipped=1")
    assert process.returncode == 1
    assert len(re.findall("error: 2 of the last 100 .*step 3.*faults.max_skipped", process.stderr)) == 1
    assert last_checkpoint(tmp_path)["global_step"] == 2


def test_sigterm_saves_and_the_same_command_goes_on_exactly(run, tmp_path):
    """To rank 0 at the end of an epoch, then to rank 1 within an accumulation; nothing of the curve changes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seldom = ("checkpoint.every_n_steps=100", "ckpt_path=last")
    assert run(1, None, *seldom, run_dir=whole).returncode == 0
    for fault, steps in (("sigterm_in_step_2", 2), ("sigterm_in_step_3", 3)):
        process = run(2, fault, *seldom, run_dir=parts)
        assert process.returncode == 128 + signal.SIGTERM, process.stderr
        assert f"saved {parts}/checkpoints/last.ckpt at step {steps}" in process.stderr
        assert (result_of(parts)["status"], result_of(parts)["steps"]) == ("interrupted", steps)
    assert run(1, None, *seldom, run_dir=parts).returncode == 0
    assert_same_rows(rows_of(parts), rows_of(whole))


def test_a_checkpoint_is_of_whole_steps_and_their_validation(run, tmp_path):
    """Steps 2 and 4 are validated, within an epoch; the run fails in step 3, begins it again and fails in its second
    micro-batch, and goes on to the end: nothing is left out, neither of the curve nor of what is best so far."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rare = ("data.samples_per_epoch=12", "trainer.max_steps=5", "checkpoint.every_n_steps=2", "ckpt_path=last",
            "early_stop.monitor=val/loss", "early_stop.min_delta=1e9", "early_stop.patience=9")  # fmt: skip
    assert run(1, None, *rare, run_dir=whole).returncode == 0
    for fault in ("exception", "exception_in_second_micro_batch"):
        assert run(2, fault, *rare, run_dir=parts).returncode == 1
        checkpoint = last_checkpoint(parts)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert (checkpoint["global_step"], progress["ready"], progress["completed"]) == (2, 4, 4)
        assert [row["step"] for row in rows_of(parts) if row["val/loss"]] == ["0", "2"]
    assert run(1, None, *rare, run_dir=parts).returncode == 0
    assert_same_rows(rows_of(parts), rows_of(whole))
    (found, count), (expected, count_expected) = (validated(last_checkpoint(path)) for path in (parts, whole))
    assert count == count_expected == 1
    assert found == pytest.approx(expected, rel=1e-8)
    assert moments_of(last_checkpoint(parts)) == {5.0}, "the last step is saved, though no checkpoint was due"


VAL = "data.val=[tests/data/*.tar]"
ENDS = {
    "with an epoch": ("trainer.max_steps=2",),
    "with an epoch that is cut short": (
        "trainer.max_steps=2",
        "data.samples_per_epoch=5",
        "trainer.limit_train_batches=3",
    ),
    "with an epoch that is validated": ("trainer.max_steps=2", VAL, "trainer.val_check_interval=3"),
    "within an epoch": ("trainer.max_steps=3",),
    "after an epoch, without a limit to steps": ("trainer.max_steps=-1", "trainer.max_epochs=1"),
    "within an epoch, by an early stop within a step": (
        *("trainer.max_steps=-1", "trainer.max_epochs=9", VAL, "trainer.val_check_interval=2"),
        *("early_stop.monitor=val/distogram", "early_stop.patience=1", "early_stop.min_delta=1e9"),
    ),
}

BY_DEFAULT = ("with an epoch that is validated", "within an epoch")


SHORT_EPOCHS = (
    *("data.samples_per_epoch=3", "checkpoint.every_n_steps=100", "ckpt_path=last", "data.val=[]"),
    "data.crop_schedule={0: 12, 2: 14, 3: 16}",
)
"""Three micro-batches an epoch, which are two steps, the second of one micro-batch."""


@pytest.fixture(scope="module")
def whole_of(forked_runs, tmp_path_factory):
    """Rows of a run in short epochs without an interruption, with these settings."""

    @cache
    def rows(*settings: str) -> list[dict[str, str]]:
        run_dir = tmp_path_factory.mktemp("whole")
        given = [*SMALL, "cp.grid=1x1", *SHORT_EPOCHS, *settings, f"hydra.run.dir={run_dir}"]
        assert forked_runs.run(1, given).returncode == 0
        return rows_of(run_dir)

    return rows


@pytest.mark.parametrize(
    "end", [end if end in BY_DEFAULT else pytest.param(end, marks=pytest.mark.slow) for end in ENDS]
)
def test_a_run_that_has_ended_goes_on_where_more_is_asked_for(run, whole_of, tmp_path, end):
    both = tuple(setting for setting in ENDS[end] if setting.startswith(("data.", "trainer.val", "trainer.limit")))
    first = run(1, None, *SHORT_EPOCHS, *ENDS[end])
    assert first.returncode == 0, first.stderr
    made = result_of(tmp_path)["steps"]
    assert 2 <= made <= 3 and last_checkpoint(tmp_path)["global_step"] == made
    assert run(1, None, *SHORT_EPOCHS, *both).returncode == 0
    assert_same_rows(rows_of(tmp_path), whole_of(*both))
    assert [row["crop_size"] for row in rows_of(tmp_path) if row["train/loss"]] == ["12", "12", "14", "16"]


@pytest.mark.slow
def test_an_epoch_goes_on_with_other_replicas(run, tmp_path):
    """Two replicas make the step that one makes of two micro-batches, three of them an epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ("data.samples_per_epoch=6", "data.val=[]", "ckpt_path=last")
    assert run(1, None, *given, "trainer.max_steps=5", run_dir=whole).returncode == 0
    replicas = ("cp.grid=1x1", "dp=2", "trainer.accumulate_grad_batches=1")
    for ranks, steps, grid in ((1, 1, ()), (2, 4, replicas), (1, 5, ())):
        done = run(ranks, None, *given, f"trainer.max_steps={steps}", *grid, run_dir=parts)
        assert done.returncode == 0, done.stderr
    assert_same_rows(rows_of(parts), rows_of(whole))


def validated(checkpoint: dict) -> tuple[float, int]:
    """The best loss of validation so far, and how many since did not improve on it."""
    states = {name.partition("{")[0]: state for name, state in checkpoint["callbacks"].items()}
    return float(states["ModelCheckpoint"]["best_model_score"]), states["EarlyStop"]["wait_count"]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("shared", ["parallel.fsdp=false", pytest.param("parallel.fsdp=true", marks=pytest.mark.slow)])
def test_a_full_disk(run, tmp_path, small_disk, shared):
    """There is room for one checkpoint, and not for the next one beside it."""
    assert run(1, None, "data.val=[]", "trainer.max_steps=1", shared).returncode == 0
    last = tmp_path / "checkpoints" / "last.ckpt"
    size = sum(file.stat().st_size for file in (last.rglob("*") if last.is_dir() else [last]))
    run_dir = small_disk(int(1.6 * size)) / "run"
    process = run(2, None, "data.val=[]", shared, run_dir=run_dir)
    assert process.returncode == 1
    assert re.search(f"error: the disk is full.* {re.escape(str(run_dir))}/checkpoints/last.ckpt", process.stderr)
    assert "Traceback" not in process.stderr
    if shared == "parallel.fsdp=true":
        assert load_sharded(run_dir / "checkpoints" / "last.ckpt", None)["global_step"] == 1
        assert len(list((run_dir / "checkpoints" / "last.ckpt").iterdir())) == 2
    else:
        assert last_checkpoint(run_dir)["global_step"] == 1
    assert not list(run_dir.rglob("*" + PARTIAL))
    assert result_of(run_dir)["status"] == "failed"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, small_disk):
    path = small_disk(1_500_000) / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint({"step": 1, "weights": torch.zeros(200_000)}, path)
    with pytest.raises(DiskFullError, match=r"last\.ckpt"):
        io.save_checkpoint({"step": 2, "weights": torch.zeros(200_000)}, path)
    assert torch.load(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_killed_while_it_writes(tmp_path):
    """Forty times, half of them when all is written and nothing on the disk, the others after times from nothing to two
    checkpoints: the latest one can always be read."""
    path = tmp_path / "last.ckpt"
    io = WholeCheckpointIO()
    weights = torch.arange(400_000)
    io.save_checkpoint({"step": 0, "weights": weights}, path)
    began = time.perf_counter()
    io.save_checkpoint({"step": 0, "weights": weights}, path)
    takes = time.perf_counter() - began
    step, during = 0, 0
    for kill in range(40):
        certain = kill % 2 == 0
        process = os.fork()
        if process == 0:
            if certain:
                os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            while True:
                step += 1
                io.save_checkpoint({"step": step, "weights": weights + step}, path)
        if not certain:
            time.sleep(takes * kill / 20)
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        during += path.with_name(path.name + PARTIAL).exists()
        checkpoint = torch.load(path)
        assert checkpoint["step"] >= step
        step = checkpoint["step"]
        assert torch.equal(checkpoint["weights"], weights + step)
        remove_partial_files(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert during >= 20
