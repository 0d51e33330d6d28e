"""What a run shows: its first line, the block at its start, bar or lines, and its end."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from cpfold_train.cli.start import is_run
from cpfold_train.config.compose import compose as compose_settings
from cpfold_train.config.composition import typed_config
from cpfold_train.data.stream.shards import open_shards
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.lora import add_adapters
from cpfold_train.parallel.grid import Grid
from cpfold_train.reports import ending as reports_ending
from cpfold_train.reports.course import Course, course, trend, verdict
from cpfold_train.reports.ending import Ending, next_commands, print_ending
from cpfold_train.reports.metrics import VALIDATION
from cpfold_train.reports.progress import Progress, bar, clock, line
from cpfold_train.reports.shell import pasted
from cpfold_train.tables import make_block, on_terminal
from cpfold_train.training.reporting import ending as reporting_ending
from cpfold_train.training.reporting import progress as shows
from cpfold_train.training.reporting.ending import longer
from cpfold_train.training.reporting.start import (
    dashboards,
    describe_data,
    describe_memory,
    describe_model,
    describe_steps,
)
from tests.golden.case import CONFIG
from tests.test_config import compose
from tests.test_training_runs import ROOT

ROW = {"train/loss": 123.45678, "lr": 1.8e-3, "step_s": 1234.5, "tokens": 3072, "peak_memory_mib": 81234.5,
       "data_wait_s": 0.01, "exposed_comm_s": 12.5, "tokens_per_s": 123.4, "mfu": 0.412}  # fmt: skip
NONE = Path("no metrics.csv")
LONG = "a_very_long_name_of_a_run_" * 4


def typed(text: str) -> list[str]:
    """The words that a shell makes of a command."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def written(renderable, width: int, terminal: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False).print(renderable)
    return file.getvalue()


def test_the_first_line_comes_before_torch():
    code = (
        "import sys; sys.argv = ['train.py']; import cpfold_train.cli.start; print({*sys.modules} & {'torch', 'hydra'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert is_run([]) and is_run(["crop_size=24", "-m"])
    assert not is_run(["--help"]) and not is_run(["crop_size=24", "--cfg", "job"]) and not is_run(["--version"])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("total", [None, 150, 5_000_000])
@pytest.mark.parametrize("validating", [None, (12, 345)])
def test_the_bar_is_one_line(width, total, validating):
    progress = Progress(120_000, total, None if total is None else 0.5, 3e6, ROW, 12.3456, 119_000, validating)
    text = written(bar(progress, width), width)
    assert text.count("\n") == 1 and len(text.rstrip()) <= width
    assert text.startswith("step 120000" + (f"/{total} " if total else " "))
    if width >= 80:
        assert "34 d 17 h left" in text
        assert ("validation 12/345" if validating else "loss 123.4568") in text
    if width == 200:
        assert "val 12.3456 @ 119000" in text and "0.412 mfu" in text and "8.123e+04 MiB" in text
    if width >= 60 and total == 150:
        assert "━" in text


def test_the_line_of_a_step():
    progress = Progress(50, 150, 1 / 3, 3725.0, ROW, 12.3456, 40)
    told = "step 50/150  loss 123.4568  lr 1.80e-03  1234.50 s/step  val/loss 12.3456 @ 40  1:02:05 left"
    assert line(progress) == told
    assert clock(59.6) == "1:00" and clock(90_000) == "1 d 1 h"
    assert line(Progress(7, row=ROW)) == "step 7  loss 123.4568  lr 1.80e-03  1234.50 s/step"


def trainer_at(step: int = 0, **changes) -> SimpleNamespace:
    known = {"global_step": step, "max_steps": -1, "max_epochs": -1, "accumulate_grad_batches": 4, "callbacks": []}
    known |= {"num_training_batches": 10, "log_every_n_steps": 2, "is_global_zero": True, "sanity_checking": False}
    known |= {"num_val_batches": [3], "num_sanity_val_batches": [2], "current_epoch": 0}
    return SimpleNamespace(**known | changes)


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({}, None),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 5}, 15),
        ({"max_epochs": 5, "max_steps": 100}, 15),
        ({"max_epochs": 5, "max_steps": 7}, 7),
        ({"max_epochs": 0}, 0),
    ],
)
def test_steps_of_a_run(limits, total):
    assert shows.total_steps(trainer_at(**limits), 10) == total
    assert shows.total_steps(trainer_at(**limits), float("inf")) == limits.get("max_steps")


@pytest.fixture
def clocked(monkeypatch):
    """Time that only passes where a test lets it."""
    now = [1000.0]
    monkeypatch.setattr(shows, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def driven(shown: shows.ShowProgress, trainer: SimpleNamespace, clocked: list[float]) -> None:
    """Steps 41 and 42, 10 and 2 seconds long, of two micro-batches, and a validation before the last."""
    module = SimpleNamespace(validation={"val/loss": 3.25})
    shown.on_train_start(trainer, module)
    for seconds in (10.0, 2.0):
        shown.on_train_batch_end(trainer, module)
        clocked[0] += seconds
        trainer.global_step += 1
        shown.on_train_batch_end(trainer, module)
        if isinstance(shown, shows.Bar) and trainer.global_step == 41:
            shown.on_validation_batch_end(trainer, module, None, None, 1)
        if trainer.global_step == 41:
            shown.on_validation_end(trainer, module)


def test_a_resumed_run_knows_its_last_validation(clocked, tmp_path):
    earlier = tmp_path / "metrics.csv"
    earlier.write_text("step,val/loss\n20,3.5\n40,3.25\n60,3.0\n")
    shown = shows.Lines(SimpleNamespace(row=ROW), earlier)
    shown.on_train_start(trainer_at(50, max_steps=100), None)
    # What lies beyond the checkpoint is made again.
    assert (shown.progress.validation, shown.progress.validated_at) == (3.25, 40)


def test_lines_of_a_resumed_run(clocked, capsys):
    shown = shows.Lines(SimpleNamespace(row=ROW), NONE)
    driven(shown, trainer_at(40, max_steps=100), clocked)
    # The first step says nothing of the others; and a line comes where a step is logged.
    told = "step 42/100  loss 123.4568  lr 1.80e-03  1234.50 s/step  val/loss 3.2500 @ 41  1:56 left\n"
    assert capsys.readouterr().out == told
    shown.on_train_batch_end(trainer_at(42), None)
    assert capsys.readouterr().out == ""


def test_time_that_is_left_of_max_time(clocked):
    shown = shows.Lines(SimpleNamespace(row=ROW), NONE)
    timer = Timer("00:00:01:00")
    timer.time_elapsed = lambda *_: 45.0
    driven(shown, trainer_at(40, callbacks=[timer]), clocked)
    assert (shown.progress.total, shown.progress.part, shown.progress.seconds_left) == (None, 0.75, 15.0)


def test_the_bar_on_a_terminal(clocked, monkeypatch):
    drawn = io.StringIO()
    options = {"file": drawn, "force_terminal": True, "width": 80, "legacy_windows": False}
    monkeypatch.setattr(shows, "_WithCursor", lambda **given: Console(**given, **options))
    monkeypatch.setattr(shows, "REFRESH", -1.0)
    shown, trainer = shows.Bar(SimpleNamespace(row=ROW), NONE), trainer_at(40, max_steps=100)
    driven(shown, trainer, clocked)
    print(f"saved; {LONG} goes on")
    shown.on_train_end(trainer, None)
    text = drawn.getvalue()
    assert "step 40/100" in text and "validation 2/3" in text and "step 42/100" in text.split(LONG)[-1]
    # What is printed meanwhile stays in one piece.
    assert f"saved; {LONG} goes on" in text
    assert text.count("\n") < 5 and sys.stdout.write.__self__ is sys.stdout


def test_what_is_no_terminal_gets_lines(monkeypatch):
    assert not on_terminal()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert on_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not on_terminal()


def rows(**columns: list) -> list[dict[str, str]]:
    length = len(next(iter(columns.values())))
    return [
        {"step": str(10 * i)} | {n.replace("__", "/"): str(values[i]) for n, values in columns.items()}
        for i in range(length)
    ]


def test_the_course_of_a_metric():
    found = rows(val__loss=[4.0, "nan", 2.0, "", 3.0], val__distance_lddt=[0.5, 0.7, 0.7, "", 0.6])
    assert course(found, "val/loss") == Course(4.0, 0, 2.0, 20, 3.0, 40)
    assert course(found, "val/distance_lddt") == Course(0.5, 0, 0.7, 10, 0.6, 40)
    assert course(found, "val/distogram") is None
    assert trend(rows(train__loss=[float(i) for i in range(100)]), "train/loss") == (4.5, 94.5)
    assert trend(rows(train__loss=[1.0, "nan", 2.0, 3.0]), "train/loss") == (1.0, 3.0)
    assert [verdict("val/loss", 1, x) for x in (0, 1, 2)] == ["better", "same", "worse"]
    assert [verdict("val/distance_lddt", 1, x) for x in (0, 1, 2)] == ["worse", "same", "better"]


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """A run in a directory with a long name that the shell would take apart."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / f"{LONG} & 'quoted'"
    (run_dir / "checkpoints").mkdir(parents=True)
    for name in ("last.ckpt", "best-step-20.ckpt"):
        (run_dir / "checkpoints" / name).write_text("")
    columns = ["step", "train/loss", *VALIDATION]
    lines = [",".join(columns), *(",".join([str(10 * i), *[str(5.0 - i)] * (len(columns) - 1)]) for i in range(3))]
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    samples = [json.dumps({"tar": "a.tar", "key": f"1ab{i}"}) for i in (0, 1, 2, 3, 4, 4, 5)]
    # The last line was torn by a file system.
    (run_dir / "quarantine.jsonl").write_text("\n".join([*samples, samples[0][:9]]) + "\n")
    result = {"steps": 20, "seconds": 4000, "quarantined": 7, "skipped": 2, "left_out": {"val/distogram": 3}}
    (run_dir / "result.json").write_text(json.dumps(result))
    best = run_dir / "checkpoints" / "best-step-20.ckpt"
    return run_dir, Ending(20, "", "trainer.max_steps=40", best, ["my shards/*.tar"])


def test_the_end_of_a_run(ended):
    run_dir, known = ended
    file = io.StringIO()
    print_ending(run_dir, known, Console(file=file, width=80, color_system=None))
    text = file.getvalue()
    told = " ".join(text.split())
    assert "\r" not in text
    assert (
        "20 steps, in 1:06:40" in told
        and "7 (1ab0, 1ab1, 1ab2, 1ab3, 1ab4, ...), listed in" in told
        and "skipped steps 2" in told
    )
    assert "without a pair to score: 3 of val/distogram" in told
    assert "val/loss 5.0000 3.0000 20 3.0000 better" in told
    assert "val/distance_lddt 5.0000 5.0000 0 3.0000 worse" in told
    # No line is longer but those of a word that a shell needs in one piece.
    assert all(len(row) <= 80 or len(shlex.split(row.removesuffix("\\"))) == 1 for row in text.splitlines()), text
    for what, words in next_commands(run_dir, known):
        shown = text.split(f"{what}\n")[1].replace("\\\n", "").split("\n")[0]
        assert typed(shown) == words
    commands = dict(next_commands(run_dir, known))
    assert commands["go on"][-2:] == [f"runs/{run_dir.name}", "trainer.max_steps=40"]
    # Those of another checkpoint lie beside them.
    assert commands["predict"][-1] == f"runs/{run_dir.name}/predictions/best-step-20" == commands["evaluate"][-2]
    assert commands["predict"][-4].endswith("best-step-20.ckpt") and commands["predict"][-3] == "my shards/*.tar"


def test_next_commands_are_those_that_work(ended, monkeypatch):
    run_dir, known = ended
    assert "compare with the run before" not in dict(next_commands(run_dir, known))
    other = run_dir.with_name("other")
    other.mkdir()
    (other / "metrics.csv").write_text("step\n")
    assert dict(next_commands(run_dir, known))["compare with the run before"][-2:] == [
        "runs/other",
        f"runs/{run_dir.name}",
    ]
    sharded = run_dir / "checkpoints" / "sharded.ckpt"
    sharded.mkdir()
    found = dict(next_commands(run_dir, Ending(20, "", "", sharded, ["x.tar"])))
    assert "go on" not in found and found["predict"][-4] == found["make one file of the checkpoint"][-1]
    assert next_commands(other, Ending(0, "", "", None, ["x.tar"])) == []
    monkeypatch.setattr(reports_ending, "read_result", lambda _: {"steps": 20})
    file = io.StringIO()
    print_ending(other, Ending(0, "", "", None, []), Console(file=file, width=80))
    assert "no step was made: step 20 is at a limit" in file.getvalue()


def test_what_lets_a_run_go_on():
    assert longer(trainer_at(150, max_steps=150)) == "trainer.max_steps=300"
    assert longer(trainer_at(60, max_steps=150)) == ""
    assert longer(trainer_at(60, max_epochs=3, current_epoch=3)) == "trainer.max_epochs=6"
    timer = Timer("00:20:00:30")
    assert longer(trainer_at(60, max_steps=150, callbacks=[timer])) == ""
    timer.time_elapsed = lambda *_: 20 * 3600 + 31.0
    assert longer(trainer_at(60, max_steps=150, callbacks=[timer])) == "trainer.max_time=01:16:01:00"


@pytest.mark.parametrize("width", [30, 80])
def test_commands_can_be_pasted(width):
    words = ["cpfold-train", "resume", "a b", "$HOME", f"x={LONG}", "'", "data.val=[a,b]"] + ["word"] * 30
    text = pasted(words, width)
    assert typed(text) == words
    assert all(len(row) <= width or LONG in row for row in text.splitlines())


def test_the_start_block():
    config = typed_config(compose("data.train=[tests/data/*.tar]", "data.val=[]", "crop_size=700",
                                  "data.crop_schedule={10: 800}", "trainer.accumulate_grad_batches=2"))  # fmt: skip
    stored = open_shards(["tests/data/*.tar"])
    samples, lines = describe_data(config)
    told = dict(lines)
    assert samples == len(stored) and f"{sum(sample.tokens for sample in stored):,} in all" in told["data"]
    larger = sum(sample.tokens > 700 for sample in stored)
    assert told["crops"] == f"700 tokens, 800 from step 10 on (neighbourhood); {larger} samples are larger"
    assert told["validation"] == "none"
    trainer = trainer_at(4, max_steps=9, accumulate_grad_batches=2, strategy=SimpleNamespace(grid=Grid(1, 2, 3)))
    assert describe_steps(config, trainer, 5) == "9, goes on from step 4; 6 samples a step, 3 steps an epoch"
    config.trainer.max_time, trainer.max_steps = "00:01:00:00", -1
    assert describe_steps(config, trainer, 5).startswith("until 00:01:00:00, ")

    model = CoFolding(CONFIG, config.memory)
    add_adapters([module for name, module in model.named_modules() if name.endswith("proj_o")], 2, 4.0)
    for name, parameter in model.named_parameters():
        if ".norm" in name:
            parameter.requires_grad_(False)
    trained, sentence = describe_model(model, trains_confidence=True)
    known = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert trained == known and 0 < adapters < trained
    assert f": {trained - adapters:,} trained, {adapters:,} LoRA, " in sentence
    without = describe_model(model, trains_confidence=False)[1]
    assert f"{sum(p.numel() for p in model.confidence_module.parameters()):,} without a loss" in without
    # Weights, gradients, two moments and the average of what is trained, in fp32.
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert config.optim.ema_decay
    held = 4 * (5 * trained + frozen) / 2**20
    assert describe_memory(config, Grid(1, 1), trained, model).startswith(
        f"a rank {held:,.1f} MiB of weights and optimizer, "
    )


def test_where_a_run_can_be_followed(tmp_path):
    class Dashboard(WandbLogger):
        def __init__(self, **known) -> None:
            self.known = SimpleNamespace(dir=str(tmp_path / "wandb" / "offline-run-1" / "files"), **known)

        experiment = property(lambda self: self.known)

    loggers = [Dashboard(offline=True, url=None), Dashboard(offline=False, url="https://wandb.ai/a/b")]
    assert dashboards(tmp_path, loggers) == [
        ("metrics", f"{tmp_path}/metrics.csv"),
        ("W&B", f"offline: wandb sync {tmp_path}/wandb/offline-run-1"),
        ("W&B", "https://wandb.ai/a/b"),
    ]


def test_a_block_is_whole_in_a_narrow_terminal():
    block = make_block([("run directory", f"/data/{LONG}"), ("model", "many words " * 20)])
    text = written(block, 80)
    assert all(len(row) <= 80 for row in text.splitlines())
    assert LONG in "".join(row.strip() for row in text.splitlines()).replace("run directory", "")


def test_a_start_without_a_step_has_made_none(monkeypatch, tmp_path):
    """Lightning does not begin to train where the limit was reached before."""
    endings: list[Ending] = []
    monkeypatch.setattr(reporting_ending, "print_ending", lambda run_dir, ending, console: endings.append(ending))
    trainer = SimpleNamespace(is_global_zero=True, callbacks=[], global_step=8, max_steps=8, max_epochs=None)
    block = reporting_ending.EndBlock(compose_settings(["trainer.max_steps=8"]), tmp_path)
    block.on_fit_end(trainer, None)
    block.on_train_start(SimpleNamespace(global_step=6), None)
    block.on_fit_end(trainer, None)
    assert [ending.steps_here for ending in endings] == [0, 2]
