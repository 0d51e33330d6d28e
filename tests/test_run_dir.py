"""A run directory belongs to one run at a time, and is not started in twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cpfold_train.cli import run_dir as of
from cpfold_train.cli.run_dir import LOCK, claimed
from cpfold_train.cli.sweep import _new_folder
from cpfold_train.errors import ConfigError
from tests.test_faults import SMALL
from tests.test_training_runs import ROOT

HOLDS = """
import sys
from pathlib import Path
from cpfold_train.cli.run_dir import claimed

sys.stdin.readline()
with claimed(Path(sys.argv[1]), may_vary=True, goes_on=False) as run_dir:
    print(run_dir.name, flush=True)
    sys.stdin.readline()
"""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}


@pytest.fixture
def holders(tmp_path) -> Iterator:
    """Starts processes that hold ``tmp_path / "12-00-00"`` or the next name, all at the same moment; returns the names
    that they have got."""
    processes: list[subprocess.Popen] = []

    def start(*envs: dict[str, str]) -> list[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", HOLDS, str(tmp_path / "12-00-00")]
        own = {"PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen(command, env=os.environ | own | env, **pipes) for env in envs]
        processes.extend(started)
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in started]

    start.processes = processes
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_runs_of_one_second_have_directories_of_their_own(holders, tmp_path):
    assert sorted(holders({}, {}, {})) == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    # One that is over is not started in either.
    (tmp_path / "12-00-00-4").mkdir()
    (tmp_path / "12-00-00-4" / "metrics.csv").write_text("step\n1\n")
    assert holders({}) == ["12-00-00-5"]


def test_ranks_of_torchrun_share_the_other_name(holders):
    """Without a word between them, and also when torchrun starts them again."""
    assert holders({}) == ["12-00-00"]
    ranks = [{**TORCHRUN, "RANK": str(rank)} for rank in range(3)]
    assert holders(*ranks) == ["12-00-00-2"] * 3
    for process in holders.processes[1:]:
        process.kill()
    assert holders(*ranks) == ["12-00-00-2"] * 3


def test_a_held_directory_is_refused_until_its_run_is_gone(holders, tmp_path):
    holders({})
    (holder,) = holders.processes
    folder = tmp_path / "12-00-00"
    told = f"{socket.gethostname()} .*process {holder.pid}, started 20.*another hydra.run.dir"
    with pytest.raises(ConfigError, match=told), claimed(folder, may_vary=False, goes_on=True):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(folder, may_vary=False, goes_on=True) as got:
        assert got == folder
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert json.loads((folder / LOCK).read_text())["ended"]
    assert [path.name for path in folder.iterdir()] == [LOCK]


@pytest.mark.parametrize("touched", [True, False])
def test_a_run_on_another_machine_lives_while_it_touches_its_lock(tmp_path, monkeypatch, touched):
    monkeypatch.setattr(of, "BEAT", 0.1)
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 1, "created": 0.0, "started": "today"}))
    os.utime(lock, (1, 1))
    sleep = of.time.sleep
    monkeypatch.setattr(of.time, "sleep", lambda s: (sleep(s), os.utime(lock) if touched else None))
    if touched:
        with pytest.raises(ConfigError, match="elsewhere"), claimed(tmp_path, may_vary=False, goes_on=True):
            pass
    else:
        with claimed(tmp_path, may_vary=False, goes_on=True):
            assert json.loads(lock.read_text())["host"] == socket.gethostname()


def test_a_lock_of_a_killed_start_is_empty(tmp_path):
    (tmp_path / LOCK).touch()
    with claimed(tmp_path, may_vary=False, goes_on=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written .*another hydra\.run\.dir"):
        claimed(tmp_path / "file" / "run", may_vary=False, goes_on=False).__enter__()


def test_sweeps_of_one_second(tmp_path):
    assert [_new_folder(tmp_path / "12-00-00").name for _ in range(2)] == ["12-00-00", "12-00-00-2"]


def test_a_new_run_leaves_an_old_one_alone(forked_runs, tmp_path):
    """It is refused, and goes on where that is what was typed."""
    given = [*SMALL, "cp.grid=1x1", "data.val=[]", f"hydra.run.dir={tmp_path}"]
    assert forked_runs.run(1, [*given, "trainer.max_steps=1"]).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK}
    again = forked_runs.run(1, given)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert f'resume="{tmp_path}"' in again.stderr and "another hydra.run.dir" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert forked_runs.run(1, [*given, "trainer.max_steps=2", "ckpt_path=last"]).returncode == 0
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2


def test_a_start_without_a_checkpoint_is_begun_again_without_its_metrics(forked_runs, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/loss\n0,7.0\n")
    given = [*SMALL, "cp.grid=1x1", "data.val=[]", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}"]
    assert forked_runs.run(1, [*given, "ckpt_path=last"]).returncode == 0
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["step", "1"]


@pytest.mark.slow
def test_ranks_of_one_command_share_the_other_name(tmp_path):
    """Every second of the next minutes has a run of its own already."""
    for second in range(200):
        taken = tmp_path / "r=1" / time.strftime("%Y-%m-%d/%H-%M-%S", time.localtime(time.time() + second))
        taken.mkdir(parents=True)
        (taken / "metrics.csv").write_text("step\n1\n")
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "cp.grid=1x2", "data.val=[]", "trainer.max_steps=1"]
    command += [f"data.train=[{ROOT}/tests/data/*.tar]", "hydra.run.dir='r=1/${run_stamp:}'"]
    # Nor do variables of another launcher change anything.
    left = {"MASTER_ADDR": "somehost.invalid", "NODE_RANK": "1", "RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | left
    assert subprocess.run(command, cwd=tmp_path, env=env, timeout=200, check=False).returncode == 0
    (result,) = (tmp_path / "r=1").glob("*/*/result.json")
    assert result.parent.name.endswith("-2")
    assert len((result.parent / "metrics.csv").read_text().splitlines()) == 2
