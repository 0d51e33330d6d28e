"""Sweeps: each job of a Hydra multirun is a process tree of its own, and the sweep ends with a table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cpfold_train.config.quoting import hydra_quoted
from cpfold_train.config.world import OTHER_LAUNCHERS
from cpfold_train.interrupts import answer_interrupts, leave_interrupts
from cpfold_train.reports.jobs import best_job, jobs_table, read_job, write_jobs
from cpfold_train.reports.result_file import read_result
from cpfold_train.reports.shell import shown
from cpfold_train.tables import make_console
from cpfold_train.whole_file import whole_file

_JOB = "job.json"
TABLE = "sweep.csv"
"""In the directory of the sweep: a row for each job."""


def run_job(train: list[str], overrides: list[str], job_dir: Path, sweep: DictConfig | None = None) -> float:
    """Run one job to its end in processes of its own, its output going where the sweep's goes.

    Args:
        train: the command that starts a run.
        overrides: what sets the job apart, as typed.
        job_dir: its run directory.
        sweep: ``hydra.sweep``; if the sweep is asked to end, what it has done is shown.

    Returns:
        What an optimising sweeper minimises: the last validation loss, else the last training loss; infinity for a
        job that failed. A failed job does not raise, so the others still run.
    """
    env = {name: value for name, value in os.environ.items() if name not in (*OTHER_LAUNCHERS, "PL_GLOBAL_SEED")}
    started = time.time()
    print(f"job {job_dir.name}: {' '.join(overrides)}", flush=True)
    # A recipe may itself ask for a sweep; the job must not start it again.
    command = [*train, *overrides, "hydra.mode=RUN", f"hydra.run.dir={hydra_quoted(job_dir)}"]
    process = subprocess.Popen(command, env=env)
    asked: list[int] = []

    def end(signum: int, frame: object = None) -> None:
        asked.append(signum)
        # A terminal sends Ctrl-C to the job as well, and a second one would end it without a checkpoint.
        process.send_signal(signal.SIGTERM)

    interrupt = partial(end, signal.SIGINT)
    before = signal.signal(signal.SIGTERM, end)
    answer_interrupts(interrupt)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        leave_interrupts(interrupt)
    job = {"overrides": overrides, "exit_code": code, "seconds": round(time.time() - started, 1)}
    with whole_file(job_dir / _JOB) as file:
        file.write(json.dumps(job) + "\n")
    if asked:
        # The job has saved, and there is no next one.
        if sweep is not None:
            show_jobs(sweep)
        sys.exit(128 + asked[0])
    result = read_result(job_dir)
    losses = (result.get("val/loss"), result.get("train/loss"))
    return next((loss for loss in losses if code == 0 and loss is not None), float("inf"))


class Summary(Callback):
    """Hydra callback: a table and a file of all jobs at the end of a sweep; it fails where one of them did."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "${run_stamp:" in OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"]:
            with open_dict(config), read_write(config):
                config.hydra.sweep.dir = str(_new_folder(Path(config.hydra.sweep.dir)))
        for job in _jobs(config.hydra.sweep):
            job.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if show_jobs(config.hydra.sweep):
            sys.exit(1)


def show_jobs(sweep: DictConfig) -> int:
    """Print the table of the jobs that have ended, and write it; returns how many of them failed."""
    folder = Path(sweep.dir)
    dirs = sorted((path.parent for path in _jobs(sweep)), key=lambda path: (len(path.name), str(path)))
    ended = [json.loads((job_dir / _JOB).read_text()) for job_dir in dirs]
    jobs = [read_job(job_dir, str(job_dir.relative_to(folder)), job) for job_dir, job in zip(dirs, ended)]
    console = make_console()
    console.print(jobs_table(jobs, shown(folder)))
    if told := best_job(jobs):
        console.print(told, highlight=False, markup=False)
    write_jobs(folder / TABLE, jobs)
    console.print(shown(folder / TABLE), soft_wrap=True, highlight=False, markup=False)
    failed = sum(job.exit_code != 0 for job in jobs)
    if failed:
        print(f"{failed} of {len(jobs)} jobs failed", file=sys.stderr)
    return failed


def _new_folder(folder: Path) -> Path:
    """Make it, or where a sweep of the same second has it, ``NAME-2``."""
    for number in count(1):
        named = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
        with suppress(FileExistsError):
            named.mkdir(parents=True)
            return named
    raise AssertionError


def _jobs(sweep: DictConfig) -> list[Path]:
    """What the jobs of a sweep have left: in the sweep's directory, as deep as ``hydra.sweep.subdir`` says."""
    subdir = OmegaConf.to_container(sweep, resolve=False)["subdir"]
    return list(Path(sweep.dir).glob("/".join(["*"] * len(Path(subdir).parts) + [_JOB])))
