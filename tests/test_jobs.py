"""The table of a sweep, on the terminal and as a file."""

from __future__ import annotations

import csv
import io
import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from cpfold_train.cli import sweep
from cpfold_train.cli.sweep import Summary
from cpfold_train.reports.jobs import best_job, jobs_table, read_job, varied, write_jobs

LONG = "data.train=[/data/" + "long_name_of_a_folder/" * 4 + "*.tar]"


@pytest.fixture
def swept(tmp_path):
    """Three jobs: two were validated, the second is better in the middle, the third was refused."""
    for number, losses in enumerate([[9.0, 5.0, 4.0], [9.0, 3.5, 3.75], None]):
        folder = tmp_path / "a" / str(number)
        folder.mkdir(parents=True)
        typed = ["cp.grid=1x1", f"optim.lr={10.0**-number}", LONG if number else "finetune.freeze=[/x]"]
        job = {"overrides": typed, "exit_code": 2 if losses is None else 0, "seconds": 61.24}
        (folder / "job.json").write_text(json.dumps(job))
        if losses:
            rows = [f"{100_000 * i},{loss}" for i, loss in enumerate(losses)]
            (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *rows]))
            result = {"steps": 200_000, "train/loss": 4.25, "peak_memory_mib": [70_000.4, 81_000.6]}
            (folder / "result.json").write_text(json.dumps(result))
    return tmp_path


def jobs_in(folder):
    return [
        read_job(path.parent, path.parent.name, json.loads(path.read_text()))
        for path in sorted(folder.glob("a/*/job.json"))
    ]


def test_the_table_is_whole_in_80_columns(swept):
    file, jobs = io.StringIO(), jobs_in(swept)
    Console(file=file, width=80).print(jobs_table(jobs, "multirun/[today]"))
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text and "multirun/[today]" in text
    rows = [line.split() for line in text.splitlines()]
    assert next(row for row in rows if "200000" in row)[-7:] == [
        "200000",
        "61",
        "4.2500",
        "4.0000",
        "@",
        "200000",
        "81001",
    ]
    assert "3.5000 @ 100000" in text and "failed (2)" in text and "cp.grid" not in text
    assert varied(jobs)[2] == {"optim.lr": "0.01", "data.train": LONG.partition("=")[2]}
    assert best_job(jobs).startswith("best val/loss: 3.5000 at step 100000, job 1 (optim.lr=0.1 ")
    assert best_job(jobs[1:]) == ""


def test_the_table_is_a_file(swept, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "make_console", lambda: Console(width=80))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(swept), "subdir": "a/${hydra.job.num}"}}})
    with pytest.raises(SystemExit):
        Summary().on_multirun_end(config)
    told = capsys.readouterr()
    assert told.err == "1 of 3 jobs failed\n" and str(swept / "sweep.csv") in told.out
    rows = list(csv.DictReader((swept / "sweep.csv").open()))
    assert [row["job"] for row in rows] == ["a/0", "a/1", "a/2"]
    assert [row["status"] for row in rows] == ["completed", "completed", "failed (2)"]
    assert [row["optim.lr"] for row in rows] == ["1.0", "0.1", "0.01"] and "cp.grid" not in rows[0]
    assert [(row["val/loss best"], row["val/loss best_step"], row["val/loss last"]) for row in rows[1:]] == [
        ("3.5", "100000", "3.75"),
        ("", "", ""),
    ]
    assert (rows[0]["steps"], rows[0]["seconds"], rows[0]["peak_memory_mib"]) == ("200000", "61.24", "81000.6")


def test_one_job_alone_keeps_its_overrides(swept, tmp_path):
    (job, *_) = jobs_in(swept)
    write_jobs(tmp_path / "one.csv", [job])
    (row,) = csv.DictReader((tmp_path / "one.csv").open())
    assert row["cp.grid"] == "1x1" and row["finetune.freeze"] == "[/x]"
