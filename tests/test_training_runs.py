"""Whole runs through ``train.py``, in the processes that a user starts, on real structures and in fp64."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpfold_train.data.stream.quarantine import read_quarantine
from cpfold_train.data.stream.shards import open_shards
from cpfold_train.reports.metrics import COLUMNS, RESULT, VALIDATION

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.train=[tests/data/*.tar]",
    "crop_size=24",
    "data.max_msa_rows=4",
    "model.token_s=16",
    "model.token_z=8",
    "model.recycling_steps=1",
    "model.msa.msa_s=8",
    "model.msa.msa_blocks=1",
    "model.msa.pairwise_head_width=4",
    "model.pairformer.num_blocks=1",
    "model.pairformer.pairwise_head_width=4",
    "model.template.template_dim=8",
    "model.template.template_blocks=1",
    "model.template.pairwise_head_width=4",
    "model.atoms.atom_s=16",
    "model.atoms.atom_encoder_depth=1",
    "model.atoms.atom_decoder_depth=1",
    "model.diffusion.token_transformer_depth=1",
    "diffusion.multiplicity=2",
]
"""Data and sizes."""
TINY = [
    *SMALL,
    "data.samples_per_epoch=4",
    "optim.warmup_steps=2",
    "model.confidence.pairformer.num_blocks=1",
    "model.confidence.pairformer.pairwise_head_width=4",
    "diffusion.sampling_steps=2",
    "diffusion.validation_steps=2",
    "loss.distogram=1",
    "loss.plddt=0.1",
    "loss.resolved=0.1",
    "loss.pde=0.1",
    "loss.pae=0.1",
    "trainer.precision=64-true",
    "trainer.max_steps=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "trainer.num_sanity_val_steps=1",
    "trainer.enable_progress_bar=false",
]
"""Dropout is on, an epoch has two steps, and validation runs after each."""


def train(*arguments: str, script: str = "train.py", launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run ``train.py`` with a small model; one thread a rank, since the ranks share few cores."""
    command = [*(launcher or (sys.executable,)), script, *TINY, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def forked(forked_runs):
    """As :func:`finished`, on ranks forked from a process that has imported everything."""

    def run(ranks: int, *arguments: str, run_dir: Path) -> list[dict[str, str]]:
        return rows_of(forked_runs.run(ranks, [*TINY, *arguments, f"hydra.run.dir={run_dir}"]), run_dir)

    return run


def finished(*arguments: str, run_dir: Path, **kwargs) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` of a run that must succeed."""
    return rows_of(train(*arguments, f"hydra.run.dir={run_dir}", **kwargs), run_dir)


def rows_of(process: subprocess.CompletedProcess, run_dir: Path) -> list[dict[str, str]]:
    assert process.returncode == 0, process.stderr[-5000:]
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_curve(rows: list[dict[str, str]], reference: list[dict[str, str]], *names: str) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in reference]
    for row, expected in zip(rows, reference):
        for name in names:
            assert bool(row[name]) == bool(expected[name])
            if row[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-8)


@pytest.fixture(scope="module")
def run_dir_1x2(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("1x2")


@pytest.fixture(scope="module")
def rows_1x2(run_dir_1x2) -> list[dict[str, str]]:
    return finished("cp.grid=1x2", "profile.steps=[3,3]", run_dir=run_dir_1x2)


def test_run_directory(rows_1x2, run_dir_1x2):
    assert [int(row["step"]) for row in rows_1x2] == list(range(5))
    losses = [float(row["train/loss"]) for row in rows_1x2[1:]]
    distogram = [float(row["train/distogram"]) for row in rows_1x2[1:]]
    assert distogram[-1] < 0.9 * distogram[0]
    # Sent in training alone: two micro-batches of about one size with zero or one recycling each. Validation, which
    # runs after step 2, would double what the next step sends.
    sent = [float(row["sent_mib"]) for row in rows_1x2[1:]]
    assert max(sent) < 2.5 * min(sent)
    for name in VALIDATION:
        assert [row["step"] for row in rows_1x2 if row[name]] == ["0", "2", "4"], name
    for path in ("resolved.yaml", "checkpoints/last.ckpt", "checkpoints/best-step-4.ckpt", "pictures/loss.png"):
        assert (run_dir_1x2 / path).stat().st_size > 0
    assert (run_dir_1x2 / "pictures" / "distances_step000004.png").stat().st_size > 0
    result = json.loads((run_dir_1x2 / "result.json").read_text())
    expected = {"status": "completed", "steps": 4, "grid": "1x2", "dp": 1, "world_size": 2, "seed": 0}
    assert {key: result[key] for key in expected} == expected
    assert [*result] == [name for name in RESULT if name != "error"]
    assert result["last_losses"] == losses
    assert result["kernels"] == "torch"
    for name in ("peak_memory_mib", "peak_memory_above_baseline_mib", "sent_mib", "exposed_comm_s"):
        assert len(result[name]) == 2
        assert min(result[name]) > 0


def test_throughput_is_logged(rows_1x2):
    """A rank's part of the tokens and of the arithmetic, by the time of the step. The peak of a CPU is not known."""
    for row in rows_1x2[1:]:
        assert float(row["tokens_per_s"]) == pytest.approx(float(row["tokens"]) / 2 / float(row["step_s"]))
        assert float(row["tflops"]) > 0 and row["mfu"] == ""


def test_profiled_step_has_a_trace_of_each_rank(rows_1x2, run_dir_1x2):
    for rank in range(2):
        with gzip.open(run_dir_1x2 / "profile" / f"rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        # Matrix products of the forward pass, and the optimizer of the one step.
        assert {"aten::mm", "Optimizer.step#AdamW.step"} <= names


@pytest.mark.parametrize(("grid", "ranks"), [pytest.param("1x1", 1, marks=pytest.mark.slow), ("2x2", 4)])
def test_grid_does_not_change_the_curve(rows_1x2, forked, tmp_path, grid, ranks):
    rows = forked(ranks, f"cp.grid={grid}", "trainer.max_steps=2", run_dir=tmp_path)
    losses = [name for name in COLUMNS if name.startswith("train/")]
    assert_same_curve(rows, rows_1x2[:3], *losses, *VALIDATION, "grad_norm", "lr")


def test_resume_on_another_grid_gives_the_uninterrupted_curve(rows_1x2, forked, tmp_path):
    """Three steps, to the middle of an epoch, on 3x1; the rest on 1x1 in the same directory."""
    forked(3, "cp.grid=3x1", "trainer.max_steps=3", run_dir=tmp_path)
    # A row that the checkpoint knows nothing of, as a crash leaves it.
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,1.0" + "," * (len(COLUMNS) - 2) + "\n")
    rows = forked(1, "cp.grid=1x1", f"ckpt_path={tmp_path}/checkpoints/last.ckpt", run_dir=tmp_path)
    assert_same_curve(rows, rows_1x2, "train/loss", "grad_norm", "lr", "val/loss", "val/distance_lddt")


@pytest.mark.slow
def test_torchrun_with_replicas_equals_accumulation(rows_1x2, tmp_path):
    """Two replicas with one micro-batch each see what one replica sees in two micro-batches."""
    rows = finished(
        "dp=2",
        "cp.grid=1x1",
        "trainer.accumulate_grad_batches=1",
        "trainer.val_check_interval=2",
        "trainer.max_steps=2",
        run_dir=tmp_path,
        launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
    )
    assert_same_curve(rows, rows_1x2[:3], "train/loss", "grad_norm", "lr", "tokens")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["dp"], result["world_size"]) == (2, 2)


@pytest.mark.slow
def test_sweep_survives_a_failing_job(tmp_path):
    """The values that set the jobs apart have brackets, which mean colours to tables."""
    given = ("finetune.freeze=[/x],[msa_module]", "cp.grid=1x1", "data.val=[]", "hydra.sweep.subdir=a/${hydra.job.num}")
    process = train(*given, f"hydra.sweep.dir={tmp_path}", "-m")
    assert process.returncode == 1, process.stderr[-2000:]
    assert "error: finetune.freeze" in process.stderr
    assert "1 of 2 " in process.stderr
    table = process.stdout
    assert "failed (2)" in table and "finetune.freeze=[/x]" in table
    assert "completed" in table and "finetune.freeze=[msa_module]" in table
    assert json.loads((tmp_path / "a" / "1" / "result.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_sweep_as_submitted_jobs(tmp_path):
    """Each job goes through the launcher that also submits to SLURM. Both are refused, and the table says so."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = ["batch_size=0,-1", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}", "-m"]
    process = train(*overrides)
    assert process.returncode == 1, process.stderr[-2000:]
    assert "2 of 2 " in process.stderr
    assert process.stdout.count("failed (2)") == 2
    logs = "".join(path.read_text() for path in (tmp_path / ".submitit").glob("*/*.err"))
    assert "error: batch_size=-1 " in logs


WORKER = """
import os, sys
from torch.utils.data import get_worker_info
from cpfold_train.data.stream import loader
from cpfold_train.cli import train as entry

make = loader.make_sample

def fail(sample_spec, batch_spec, position):
    if os.environ["LOCAL_RANK"] == "1" and position == 3 and get_worker_info():
        FAULT
    return make(sample_spec, batch_spec, position)

loader.make_sample = fail
entry.main()
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("os._exit(9)", "DataLoader worker"),
        pytest.param(
            "raise ArithmeticError('a fault in a worker')",
            "ArithmeticError: a fault in a worker",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_lost_worker_ends_all_ranks(tmp_path, fault, told):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("FAULT", fault))
    start = time.monotonic()
    process = train("cp.grid=1x2", "data.val=[]", f"hydra.run.dir={tmp_path / 'run'}", script=str(script))
    assert process.returncode != 0
    assert told in process.stderr
    assert time.monotonic() - start < 120, "far less than cp.timeout_s"


def test_bad_samples_are_told_and_too_many_end_the_run(forked, forked_runs, tmp_path):
    """A sample of three is damaged. Replica 1 meets it beyond its share, while replica 0 waits for the gradients."""
    for path in (ROOT / "tests" / "data").glob("train-*"):
        shutil.copy(path, tmp_path)
    shards = [str(tmp_path / "*.tar")]
    tar = tmp_path / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    offset, size = open_shards(shards)[0].members["structure.npz"]
    data[offset + 100 : offset + size] = bytes(size - 100)
    tar.write_bytes(data)
    arguments = (f"data.train=[{shards[0]}]", "data.samples_per_epoch=8", "data.val=[]", "cp.grid=1x1", "dp=2")
    strict = [*TINY, *arguments, "data.max_bad_share=0", f"hydra.run.dir={tmp_path / 'strict'}"]
    process = forked_runs.run(2, strict)
    assert process.returncode != 0
    assert "data.max_bad_share" in process.stderr
    rows = forked(2, *arguments, "data.max_bad_share=0.9", run_dir=tmp_path / "lax")
    assert int(rows[-1]["quarantined"]) > 0
    result = json.loads((tmp_path / "lax" / "result.json").read_text())
    assert result["quarantined"] >= int(rows[-1]["quarantined"])
    assert len(result["data_wait_s"]) == len(result["data_wait_share"]) == 2
    (line,) = read_quarantine(tmp_path / "lax" / "quarantine.jsonl")
    assert line["key"] == open_shards(shards)[0].key


@pytest.mark.slow
def test_crop_schedule_survives_a_resume(forked, tmp_path):
    """Crops of two kinds grow at steps 1 and 3; a run that stops after step 3 goes on as if it had not, elsewhere."""
    schedule = ("data.crop_schedule={1:32,3:48}", "data.crop={spatial:0.5,interface:0.5}", "data.val=[]")
    whole = forked(1, "cp.grid=1x1", *schedule, run_dir=tmp_path / "whole")
    assert [int(row["crop_size"]) for row in whole] == [24, 32, 32, 48]
    forked(1, "cp.grid=1x1", "trainer.max_steps=3", *schedule, run_dir=tmp_path / "parts")
    checkpoint = f"ckpt_path={tmp_path}/parts/checkpoints/last.ckpt"
    rows = forked(2, "cp.grid=1x2", checkpoint, *schedule, run_dir=tmp_path / "parts")
    assert_same_curve(rows, whole, "train/loss", "crop_size", "tokens")


@pytest.mark.slow
def test_sigterm_ends_all_ranks(tmp_path):
    command = [sys.executable, "train.py", *TINY, "cp.grid=1x2", "data.val=[]", f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen([*command, "trainer.max_steps=-1"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics, deadline = tmp_path / "metrics.csv", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) == 128 + 15
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "interrupted"
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.2)
