"""A run that resumes with other keys does what they say: its rates, and which samples it shows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cpfold_train.cli import train as entry
from cpfold_train.training.optim import adamw_with_schedule, warmup_then_steps
from cpfold_train.training.schedule_start import StartSchedule
from tests.test_micro_batches import STEPS
from tests.test_training_runs import rows_of

PEAK, WARM, MADE = 1.8e-3, 20, 4


def trainer_of(
    lr: float, warmup: int, weight_decay: float = 0.0, betas=(0.9, 0.95), decay=(0.95, 50)
) -> SimpleNamespace:
    """What a callback sees of a run: the optimizer of two layers, the second at half the rate, and its schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    factor = warmup_then_steps(warmup, *decay)
    halved = lambda name: 0.5 if name.startswith("1") else 1.0  # noqa: E731
    optimizer, schedule = adamw_with_schedule(model, lr, betas, 1e-8, weight_decay, factor, halved)
    configs = [SimpleNamespace(scheduler=schedule)]
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=configs, model=model)


def steps(trainer: SimpleNamespace, count: int) -> list[list[float]]:
    """Make steps; returns the rates of the groups in each."""
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    rates = []
    for _ in range(count):
        optimizer.zero_grad()
        trainer.model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        config.scheduler.step()
    return rates


def resumed(before: SimpleNamespace, after: SimpleNamespace, step: int | None) -> SimpleNamespace:
    """``after`` with the state of ``before``, in the order in which Lightning does it."""
    callback = StartSchedule(step)
    callback.on_fit_start(after, None)
    after.model.load_state_dict(before.model.state_dict())
    after.optimizers[0].load_state_dict(before.optimizers[0].state_dict())
    after.lr_scheduler_configs[0].scheduler.load_state_dict(before.lr_scheduler_configs[0].scheduler.state_dict())
    callback.on_train_start(after, None)
    return after


def test_a_resume_with_the_same_keys_is_the_whole_run():
    whole, parts = trainer_of(PEAK, WARM, 0.1), trainer_of(PEAK, WARM, 0.1)
    rates = steps(whole, 8)
    steps(parts, MADE)
    parts = resumed(parts, trainer_of(PEAK, WARM, 0.1), None)
    assert steps(parts, 4) == rates[MADE:]
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "typed",
    [
        {"lr": 1e-5},
        {"warmup": 2},
        {"warmup": 1000},
        {"decay": (0.5, 3)},
        {"lr": 1e-4, "warmup": 1000, "decay": (0.9, 2), "weight_decay": 0.2, "betas": (0.5, 0.6)},
    ],
)
def test_what_is_typed_is_what_the_run_does(typed):
    """The schedule as it is typed, at the step at which the run is, in every group, with Adam's moments of before."""
    now = {"lr": PEAK, "warmup": WARM} | typed
    expected = steps(trainer_of(**now), 8)[MADE:]
    before = trainer_of(PEAK, WARM, 0.1)
    steps(before, MADE)
    after = resumed(before, trainer_of(**now), None)
    for group in after.optimizers[0].param_groups:
        assert group["betas"] == now.get("betas", (0.9, 0.95))
        assert group["weight_decay"] in (0.0, now.get("weight_decay", 0.0))
    moments = [state["exp_avg"].clone() for state in after.optimizers[0].state.values()]
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, before.optimizers[0].state.values()))
    assert steps(after, 4) == expected


def test_a_new_warm_up():
    before = trainer_of(PEAK, WARM)
    steps(before, MADE)
    assert steps(resumed(before, trainer_of(1e-4, 10), 0), 3) == steps(trainer_of(1e-4, 10), 3)


NINE = [
    *STEPS,
    "batch_size=1",
    "trainer.accumulate_grad_batches=1",
    "data.samples_per_epoch=9",
    "trainer.max_steps=10",
    "data.max_bad_share=1",
]


def traced() -> None:
    """``train.py`` that prints epoch and position of each sample that it takes a step with, on the first rank of each
    replica."""
    from cpfold_train.data.stream import loader
    from cpfold_train.training.datamodule import TileData

    make, check = loader.make_batch, TileData.on_before_batch_transfer

    def make_and_name(sample_spec: loader.SampleSpec, batch_spec: loader.BatchSpec) -> loader.PackedBatch:
        (tensors, packed, rest), bad = make(sample_spec, batch_spec)
        return (tensors, packed, rest | {"at": [(batch_spec.epoch, p) for p in batch_spec.positions]}), bad

    def tell(self: TileData, batch: dict, index: int) -> dict:
        step, epoch = self.trainer.global_step + 1, self.trainer.current_epoch
        print(*(f"AT {step} {epoch} {at[0]} {at[1]}\n" for at in batch.pop("at")), sep="", end="", flush=True)
        return check(self, batch, index)

    loader.make_batch, TileData.on_before_batch_transfer = make_and_name, tell
    entry.main()


@pytest.fixture(scope="module")
def start(forked_runs, tmp_path_factory):
    """The rows of a run, what it says, and for each sample its step, its epochs of Lightning and of the loader, and its
    position."""

    def start(ranks: int, *typed: str, run_dir: Path | None = None):
        run_dir = run_dir or tmp_path_factory.mktemp("run")
        given = [*NINE, *typed, f"hydra.run.dir={run_dir}"]
        process = forked_runs.run(ranks, given, f"{__name__}:traced")
        rows = rows_of(process, run_dir)
        found = sorted(tuple(map(int, at)) for at in re.findall(r"AT (\d+) (\d+) (\d+) (\d+)", process.stdout))
        return rows, process, found

    return start


@pytest.fixture(scope="module")
def seven(start, tmp_path_factory) -> Path:
    """The checkpoint of a run that has made seven steps of an epoch of nine samples."""
    run_dir = tmp_path_factory.mktemp("seven")
    start(1, "cp.grid=1x1", "trainer.max_steps=7", run_dir=run_dir)
    return run_dir / "checkpoints" / "last.ckpt"


def test_another_rate_and_fewer_samples(start, seven):
    """The rates are those of the schedule as it is typed; the next epoch begins, whole, and Lightning is in it too."""
    typed = (
        "cp.grid=1x1",
        "optim=af3",
        "optim.lr=1e-4",
        "optim.warmup_steps=1000",
        "data.samples_per_epoch=2",
        f"ckpt_path={seven}",
    )
    rows, process, found = start(1, *typed)
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-4 * step / 1000 for step in (8, 9, 10)], rel=1e-12)
    assert found == [(8, 1, 1, 0), (9, 1, 1, 1), (10, 2, 2, 0)]
    assert "epoch 1 begins, and 2 of 9 samples of epoch 0 are not shown" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dp", "batch_size", "accumulate"), [(1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 1, 3), (3, 1, 1), (1, 1, 4)]
)
def test_other_batches_go_on_at_the_sample(start, seven, dp, batch_size, accumulate):
    """No sample of the epoch is lost or shown twice, and the next epochs are whole, in steps of their own."""
    typed = ("cp.grid=1x1", f"dp={dp}", f"batch_size={batch_size}", f"trainer.accumulate_grad_batches={accumulate}")
    rows, process, found = start(dp, *typed, "trainer.max_steps=20", f"ckpt_path={seven}")
    assert "epoch 0 goes on with sample 8 of 9" in process.stderr
    at_once = dp * batch_size
    step, expected = 8, []
    for epoch, position in ((0, 7), *((epoch, 0) for epoch in range(1, 20))):
        batches = -(-(9 - position) // at_once)
        for batch in range(batches):
            at = step + batch // accumulate
            first = position + batch * at_once
            expected += [(at, epoch, epoch, p) for p in range(first, first + at_once) if at <= 20]
        step += -(-batches // accumulate)
    assert found == sorted(expected)
    assert [int(row["step"]) for row in rows] == list(range(8, 21))


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "begins"), [(8, 0), (3, 1), (0.5, 1)])
def test_another_limit_of_batches(start, seven, limit, begins):
    """The epoch goes on where the limit leaves something of it, and otherwise the next one begins."""
    typed = ("cp.grid=1x1", f"trainer.limit_train_batches={limit}", "trainer.max_steps=14", f"ckpt_path={seven}")
    _, process, found = start(1, *typed)
    goes_on = "epoch 0 goes on with sample 8 of 9", "no batches of the epoch are left: epoch 1 begins, and 2 of 9"
    assert goes_on[begins] in process.stderr
    length = limit if isinstance(limit, int) else int(limit * 9)
    positions = [(0, 7)] * (not begins) + [(epoch, position) for epoch in range(1, 9) for position in range(length)]
    assert found == [(8 + at, epoch, epoch, position) for at, (epoch, position) in enumerate(positions[:7])]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["data.samples_per_epoch=4", "data.train=[data/shards/val-000000.tar]", "seed=7"])
def test_other_samples_begin_the_next_epoch(start, seven, other):
    """Whole, and Lightning counts the same epochs."""
    _, process, found = start(1, "cp.grid=1x1", other, "trainer.max_steps=20", f"ckpt_path={seven}")
    assert (
        "others than in the checkpoint: epoch 1 begins, and 2 of 9 samples of epoch 0 are not shown" in process.stderr
    )
    length = 4 if "samples_per_epoch" in other else 9
    assert found == [(8 + at, 1 + at // length, 1 + at // length, at % length) for at in range(13)]


@pytest.mark.slow
def test_a_whole_run_and_two_parts_of_other_shapes(start, seven, tmp_path):
    """Two replicas of one sample and one of two make the same steps, also in the part of an epoch that is left."""
    given = ("trainer.max_steps=12", f"ckpt_path={seven}")
    two, *_ = start(2, "cp.grid=1x1", "dp=2", *given)
    one, *_ = start(1, "cp.grid=1x1", "batch_size=2", *given)
    for a, b in zip(one, two, strict=True):
        for column in ("train/loss", "grad_norm", "lr"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-9)
