"""Ctrl-C at every moment of a command, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cpfold_train.training.save_last import SaveLast
from cpfold_train.training.signals import SaveOnSigterm
from tests.test_faults import SAVES_FIRST, SMALL, assert_no_process_is_left, result_of, rows_of
from tests.test_predict_command import checkpoint  # noqa: F401
from tests.test_training_runs import ROOT

BLOCKED = """
import os, subprocess, sys, time
from cpfold_train.interrupts import quit_on_interrupt

quit_on_interrupt()
if os.fork() == 0:
    # As a data worker.
    time.sleep(60)
    sys.exit("a traceback would follow")
subprocess.Popen(["sleep", "60"])
print("started", flush=True)
{wait}
"""
IN_PYTHON = "time.sleep(60)"
IN_C = "import ctypes; [ctypes.CDLL(None).sleep(60) for _ in range(9)]"
"""Python gets no exception in before the call comes back."""


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    """A process with a group of its own, as a shell starts it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, start_new_session=True, **pipes)


def group(process: subprocess.Popen) -> list[psutil.Process]:
    """What is left of what a process has started."""
    return [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and os.getpgid(p.pid) == process.pid]


def assert_nothing_is_left(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 15
    while left := group(process):
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.05)


def wait_for(found: Callable[[], bool], process: subprocess.Popen) -> None:
    while not found():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_a_command_ends_with_all_that_it_has_started_in_one_line():
    """Wherever it waits; by Ctrl-C, which all processes get, or by a SIGINT to the command alone."""
    for wait, send in ((IN_PYTHON, os.killpg), (IN_C, os.kill)):
        with start("-c", BLOCKED.format(wait=wait)) as process:
            assert process.stdout.readline() == "started\n"
            send(process.pid, signal.SIGINT)
            assert process.communicate(timeout=30)[1] == "\ninterrupted\n"
            assert process.returncode == 130
            assert_nothing_is_left(process)


def test_the_second_ctrl_c_of_a_run_ends_it_at_once(tmp_path, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("cpfold_train.training.signals.quit_now", ended.append)
    callback = SaveOnSigterm(SaveLast(tmp_path / "it's" / "checkpoints" / "last.ckpt", 1), None)
    callback._speaks = True
    callback._interrupt()
    assert not ended and "Ctrl-C again ends it at once" in capsys.readouterr().err
    callback._interrupt()
    assert ended == ["ended at once"]
    # Only where there is something to go on from.
    assert callback._how_to_go_on() == ""
    (tmp_path / "it's" / "checkpoints").mkdir(parents=True)
    (tmp_path / "it's" / "checkpoints" / "last.ckpt").touch()
    run_dir = str(tmp_path).replace(" ", "")
    assert callback._how_to_go_on() == f"; to go on, type: python -m cpfold_train resume '{run_dir}/it'\"'\"'s'"


def test_a_sweep_lets_its_job_save(tmp_path):
    (tmp_path / "train.py").write_text(SAVES_FIRST)
    code = "import sys; from pathlib import Path; from cpfold_train.interrupts import quit_on_interrupt; "
    code += "quit_on_interrupt(); from cpfold_train.cli.sweep import run_job; "
    code += "run_job([sys.executable, 'train.py'], [], Path('job'))"
    with start("-c", code, cwd=tmp_path) as sweep:
        wait_for((tmp_path / "started").exists, sweep)
        os.kill(sweep.pid, signal.SIGINT)
        sweep.communicate(timeout=30)
        assert sweep.returncode == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_run_saves_and_goes_on_and_the_second_ctrl_c_ends_it(tmp_path):
    """Two ranks with data workers."""
    given = ["train.py", *SMALL, "cp.grid=1x2", "data.num_workers=1", f"hydra.run.dir={tmp_path}", "ckpt_path=last"]
    with start(*given, "trainer.max_steps=10000") as process:
        wait_for((tmp_path / "checkpoints" / "last.ckpt").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=200)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert told.count(f"to go on, type: python -m cpfold_train resume {tmp_path}") == 1
    assert result_of(tmp_path)["status"] == "interrupted"
    assert_no_process_is_left(tmp_path)
    steps = len(rows_of(tmp_path))
    with start(*given, f"trainer.max_steps={steps + 10000}") as process:
        wait_for(lambda: len(rows_of(tmp_path)) > steps, process)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        told = process.communicate(timeout=30)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert told.endswith("\nended at once\n") or "asked to end: saved" in told
    assert_nothing_is_left(process)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.5, 4.0])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", *SMALL, "cp.grid=1x2", "data.num_workers=1", "trainer.max_steps=10000", "hydra.run.dir={}/run"],
        ["train.py", *SMALL, "-m", "seed=1,2", "trainer.max_steps=10000", "hydra.sweep.dir={}/sweep"],
        ["-m", "cpfold_train", "plan", "model=boltz2", "crop_size=3072", "cp.grid=2x2"],
        ["-m", "cpfold_train", "evaluate", "tests/data", "tests/data"],
        ["-m", "cpfold_train", "prepare", "tests/data", "{}/shards"],
        ["-m", "cpfold_train", "bench", "triangle_multiplication", "--grid", "1x2"],
        [
            "-m",
            "cpfold_train",
            "predict",
            "CHECKPOINT",
            "tests/data/train-000000.tar",
            "--out",
            "{}/out",
            "--grid",
            "1x2",
        ],
    ],
    ids=["train", "sweep", "plan", "evaluate", "prepare", "bench", "predict"],
)
def test_at_the_start_there_is_no_traceback(
    tmp_path,
    checkpoint,  # noqa: F811
    arguments,
    seconds,
):
    given = [argument.replace("CHECKPOINT", str(checkpoint)).format(tmp_path) for argument in arguments]
    with start(*given) as process:
        time.sleep(seconds)
        before = process.poll()
        if before is None:
            os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1]
        assert "Traceback" not in told
        if before is None:
            assert process.returncode == 130, told
            assert "interrupted" in told
        assert_nothing_is_left(process)
