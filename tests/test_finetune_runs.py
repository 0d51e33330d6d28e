"""Fine-tuning through ``train.py``: what moves, what stays, what resumes and what is exported; in fp64."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from cpfold_train.checkpoints.boltz import boltz_name, weights_of
from tests.test_training_runs import TINY, assert_same_curve, rows_of

SHORT = [*TINY, "trainer.accumulate_grad_batches=1", "diffusion.validation_steps=0"]
SHORT += ["loss.plddt=0", "loss.resolved=0", "loss.pde=0", "loss.pae=0"]
LORA = [
    "finetune.lora.patterns=[pairformer_module,structure_module]",
    "finetune.lora.rank=2",
    "finetune.train=['*.norm*']",
    "optim.lr=1e-2",
    "module_statistics.every_n_steps=1",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
]


@pytest.fixture(scope="module")
def start(forked_runs):
    """Start a run of ``train.py`` on so many ranks."""

    def run(ranks: int, run_dir: Path, *arguments: str):
        return forked_runs.run(ranks, [*SHORT, *arguments, f"hydra.run.dir={run_dir}"])

    return run


@pytest.fixture(scope="module")
def base(start, tmp_path_factory) -> Path:
    """A run of two steps, to fine-tune from."""
    run_dir = tmp_path_factory.mktemp("base")
    rows_of(start(1, run_dir, "cp.grid=1x1", "data.val=[]", "trainer.max_steps=2", "optim.warmup_steps=10"), run_dir)
    return run_dir / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def lora(start, base, tmp_path_factory) -> Path:
    """LoRA on 1x1 without interruption."""
    run_dir = tmp_path_factory.mktemp("lora")
    rows_of(start(1, run_dir, "cp.grid=1x1", f"model.init_from={base}", *LORA), run_dir)
    return run_dir


def read(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_lora_trains_what_it_adds_and_no_more(base, lora):
    before = weights_of(read(base), "raw", base)
    after = read(lora / "checkpoints" / "last.ckpt")["current_model_state"]
    moved = set()
    for name, x in after.items():
        name = boltz_name(name.removeprefix("model.")).replace(".parametrizations.weight.original", ".weight")
        if ".lora_" not in name and not torch.equal(x, before[name]):
            moved.add(name)
        elif name.endswith("lora_B"):
            assert x.any(), name
    assert moved and all(".norm" in name for name in moved)
    optimizer = read(lora / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    trained = sum(".lora_" in name for name in after) + sum(".norm" in name for name in before)
    assert len(optimizer["state"]) <= trained


def test_lora_on_a_grid_and_resumed_gives_the_same_curve(start, base, lora, tmp_path):
    """Two steps on 1x2, the third on 1x1 in the same directory."""
    curve = table(lora / "metrics.csv")
    rows_of(start(2, tmp_path, "cp.grid=1x2", f"model.init_from={base}", *LORA, "trainer.max_steps=2"), tmp_path)
    again = f"ckpt_path={tmp_path}/checkpoints/last.ckpt"
    rows = rows_of(start(1, tmp_path, "cp.grid=1x1", f"model.init_from={base}", *LORA, again), tmp_path)
    assert_same_curve(rows, curve, "train/loss", "grad_norm", "lr", "val/loss", "val/distance_lddt")
    figures = [{name: row[name] for name in row if name.endswith("norm")} for row in table(tmp_path / "modules.csv")]
    expected = [{name: row[name] for name in row if name.endswith("norm")} for row in table(lora / "modules.csv")]
    assert len(figures) == len(expected) > 12
    for row, other in zip(figures, expected):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-8)


def test_statistics_add_up(lora):
    rows = table(lora / "modules.csv")
    for step in table(lora / "metrics.csv")[1:]:
        of_step = [row for row in rows if row["step"] == step["step"]]
        total = sum(float(row["gradient_norm"]) ** 2 for row in of_step) ** 0.5
        assert total == pytest.approx(float(step["grad_norm"]), rel=1e-9)
        # Some modules have no gradient, as the templates' where no sample has one: they do not move.
        for row in of_step:
            assert (float(row["update_ratio"]) > 0) == (float(row["gradient_norm"]) > 0), row
            assert not row["non_finite"]
    assert {"pairformer_module", "structure_module", "msa_module"} < {row["module"] for row in rows}


def test_what_is_exported_is_what_was_validated(start, forked_runs, lora, tmp_path):
    """A run that starts from the LoRA checkpoint, merged, has its validation loss; Boltz-2's names are exported."""
    last = lora / "checkpoints" / "last.ckpt"
    arguments = ("cp.grid=1x1", "trainer.max_steps=1", f"model.init_from={last}", "model.init_weights=ema")
    rows = rows_of(start(1, tmp_path / "merged", *arguments), tmp_path / "merged")
    assert float(rows[0]["val/loss"]) == pytest.approx(float(table(lora / "metrics.csv")[-1]["val/loss"]), rel=1e-9)

    out = tmp_path / "out.ckpt"
    done = forked_runs.run(1, [str(lora), str(out)], "tests.test_finetune_runs:export")
    assert done.returncode == 0, done.stderr
    exported, expected = read(out)["state_dict"], weights_of(read(last), "ema", last)
    plain = read(tmp_path / "merged" / "checkpoints" / "last.ckpt")["state_dict"]
    assert {boltz_name(name.removeprefix("model.")) for name in plain} == exported.keys() == expected.keys()
    assert all(torch.equal(x, expected[name].float()) for name, x in exported.items())


def test_a_checkpoint_may_be_exported_onto_itself(forked_runs, base, tmp_path):
    checkpoint, file = read(base), tmp_path / "self.ckpt"
    for key in ("state_dict", "current_model_state"):
        checkpoint[key] = {name: x.float() for name, x in checkpoint[key].items()}
    torch.save(checkpoint, file)
    done = forked_runs.run(1, [str(file), str(file)], "tests.test_finetune_runs:export")
    assert done.returncode == 0, done.stderr
    exported = read(file)["state_dict"]
    assert all(
        torch.equal(exported[boltz_name(n.removeprefix("model."))], x) for n, x in checkpoint["state_dict"].items()
    )
    done = forked_runs.run(1, [str(base), str(tmp_path)], "tests.test_finetune_runs:export")
    assert done.returncode == 2 and str(tmp_path) in done.stderr


def export() -> int:
    """``python -m cpfold_train export-boltz`` with the arguments of this process."""
    import sys

    from cpfold_train.__main__ import main

    return main(["export-boltz", *sys.argv[1:]])


def test_frozen_weights_stay_and_early_stop_ends_the_run(start, base, tmp_path):
    """No loss improves by 10^9: the first validation sets the mark, the second one ends the run, on both ranks."""
    typed = [
        f"model.init_from={base}",
        "finetune.freeze=[input_embedder,msa_module,pairformer_module,'*.norm*']",
        "finetune.lr_groups={structure_module: 0.5}",
        "trainer.val_check_interval=1",
        "early_stop.monitor=val/loss",
        "early_stop.patience=1",
        "early_stop.min_delta=1e9",
    ]
    process = start(2, tmp_path, "cp.grid=1x2", *typed)
    rows = rows_of(process, tmp_path)
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert re.search("step 2: .*val/loss", process.stdout)
    # One line a step, and nothing that only a terminal could draw over.
    assert re.findall(r"^step (\d+)/", process.stdout, re.MULTILINE) == ["1", "2"]
    assert not {"\r", "\x1b"} & {*process.stdout}
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"
    checkpoint = read(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2
    before, after = (weights_of(x, "raw", base) for x in (read(base), checkpoint))
    still = {name for name, x in before.items() if torch.equal(x, after[name])}
    frozen = {
        name
        for name in before
        if name.startswith(("input_embedder.", "msa_module.", "pairformer_module.")) or ".norm" in name
    }
    assert frozen <= still
    assert {name.partition(".")[0] for name in before.keys() - still} > {"structure_module", "s_init"}

    again = start(1, tmp_path, "cp.grid=1x1", *typed, "ckpt_path=last")
    assert re.search("no step was made: early stop .*val/loss .*early_stop.patience than 1", again.stdout)
    assert "at a limit" not in again.stdout
    assert [row["train/loss"] for row in rows_of(again, tmp_path)] == [row["train/loss"] for row in rows]
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_the_schedule_starts_where_it_is_told(start, base, tmp_path):
    """Two steps of a warm-up of ten are in the checkpoint. It starts again, once, and with the rate of the new run."""

    def rates(name: str, *arguments: str) -> list[float]:
        common = ("cp.grid=1x1", "data.val=[]", "optim.warmup_steps=10", "optim.lr=1e-3")
        rows = rows_of(start(1, tmp_path / name, *common, *arguments), tmp_path / name)
        return [float(row["lr"]) for row in rows]

    start_again = "optim.start_step=0"
    assert rates("run", f"ckpt_path={base}", start_again, "trainer.max_steps=3") == pytest.approx([1e-4])
    own = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    assert rates("run", own, start_again, "trainer.max_steps=4") == pytest.approx([1e-4, 2e-4])


def test_an_average_may_end_and_begin_in_a_resume(start, base, tmp_path):
    given = ("cp.grid=1x1", "data.val=[]", "trainer.max_steps=4", f"ckpt_path={base}")
    rows = {
        decay: rows_of(start(1, tmp_path / decay, *given, f"optim.ema_decay={decay}"), tmp_path / decay)
        for decay in ("0", "0.9")
    }
    losses, expected = ([float(row["train/loss"]) for row in rows[decay]] for decay in ("0", "0.9"))
    assert losses == pytest.approx(expected, rel=1e-12)
    # One that begins there has had one step, of two micro-batches: these weights.
    begun = (f"ckpt_path={tmp_path}/0/checkpoints/last.ckpt", "optim.ema_decay=0.9", "trainer.max_steps=5")
    process = start(1, tmp_path / "begun", *given, *begun, "trainer.accumulate_grad_batches=2")
    assert process.returncode == 0, process.stderr
    checkpoint = read(tmp_path / "begun" / "checkpoints" / "last.ckpt")
    assert checkpoint["averaging_state"]["n_averaged"] == 1
    for name, weight in checkpoint["current_model_state"].items():
        assert torch.equal(checkpoint["state_dict"][name].to(weight.dtype), weight)


def test_what_cannot_be_resumed_is_told_in_a_sentence(start, base, tmp_path):
    whole, exported = base.read_bytes(), read(base)
    del exported["optimizer_states"]
    files = {"empty": b"", "text": b"no checkpoint", "half": whole[: len(whole) // 2]}
    for name, content in files.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    torch.save(exported, tmp_path / "weights.ckpt")
    told = {name: f"error: ckpt_path={tmp_path}/{name}.ckpt " for name in (*files, "weights")}
    cases = [(tmp_path / f"{name}.ckpt", sentence) for name, sentence in told.items()]
    cases.append((base, "error: ckpt_path .*: model\\."))
    for path, sentence in cases:
        other = ["model.token_z=12"] if path == base else []
        process = start(1, tmp_path / "run", "cp.grid=1x1", "data.val=[]", f"ckpt_path={path}", *other)
        assert process.returncode == 2, process.stderr
        assert re.match(sentence, process.stderr.splitlines()[-1]) and "Traceback" not in process.stderr
    # Where a run resumes nothing is read from elsewhere.
    given = ("cp.grid=1x1", "data.val=[]", "trainer.max_steps=3", f"ckpt_path={base}", "model.init_from=gone.ckpt")
    assert start(1, tmp_path / "run", *given).returncode == 0


def test_another_selection_does_not_resume(start, base, tmp_path):
    process = start(1, tmp_path, "cp.grid=1x1", "data.val=[]", f"ckpt_path={base}", "finetune.freeze=[msa_module]")
    assert process.returncode == 2
    assert re.match("error: ckpt_path .* finetune.freeze: ", process.stderr)
