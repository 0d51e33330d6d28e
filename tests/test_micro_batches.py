"""However samples come to ranks and micro-batches, a step takes the mean over all of its samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_training_runs import TINY, assert_same_curve, rows_of

SAMPLES = 4
STEPS = [
    *TINY,
    *(f"loss.{name}=0" for name in ("plddt", "resolved", "pde", "pae")),
    "crop_size=16",
    "data.val=[]",
    "data.num_workers=0",
    "trainer.num_sanity_val_steps=0",
    "trainer.max_steps=2",
    f"data.samples_per_epoch={SAMPLES}",
    # Between the norms of the two steps: one is clipped, and none by a norm that is too small.
    "trainer.gradient_clip_val=8",
]
"""An epoch is one step of four samples."""
COLUMNS = ("train/loss", "grad_norm", "tokens", "lr")


@pytest.fixture(scope="module")
def run(forked_runs, tmp_path_factory) -> Callable[..., list[dict[str, str]]]:
    """The rows of a run on R x C x dp ranks."""

    def start(rows: int, cols: int, dp: int, batch_size: int, accumulate: int, *more: str) -> list[dict[str, str]]:
        run_dir: Path = tmp_path_factory.mktemp("run")
        given = [f"cp.grid={rows}x{cols}", f"dp={dp}", f"batch_size={batch_size}", f"hydra.run.dir={run_dir}"]
        given += [f"trainer.accumulate_grad_batches={accumulate}", *more]
        return rows_of(forked_runs.run(rows * cols * dp, [*STEPS, *given]), run_dir)

    return start


@pytest.fixture(scope="module")
def one_big_batch(run) -> list[dict[str, str]]:
    rows = run(1, 1, 1, SAMPLES, 1)
    norms = [float(row["grad_norm"]) for row in rows]
    assert min(norms) < 8 < max(norms), "all steps are clipped, or none: their weights in the curve do not show"
    return rows


FSDP = "parallel.fsdp=true"
FAST = [
    # Grid, dp, batch size, accumulation.
    (1, 1, 1, 1, 7),
    (1, 2, 1, 2, 3),
]
SLOW = [
    (1, 1, 1, 1, 4),
    (1, 1, 1, 2, 2),
    (1, 1, 1, 4, 4),
    (1, 1, 2, 1, 2),
    (1, 1, 2, 2, 1),
    (1, 1, 2, 2, 5),
    (1, 1, 4, 1, 1),
    (1, 1, 4, 1, 2),
    (2, 1, 1, 1, 4),
    (2, 3, 1, 1, 5),
    (1, 2, 2, 1, 2),
    (1, 2, 2, 1, 3),
    (1, 2, 1, 1, 4, FSDP),
    (1, 2, 1, 1, 6, FSDP),
    (1, 2, 2, 1, 3, FSDP),
    (1, 1, 2, 1, 3, FSDP),
    (1, 1, 2, 2, 1, FSDP),
]


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_a_step_is_that_of_one_big_batch(run, one_big_batch, case):
    assert_same_curve(run(*case), one_big_batch, *COLUMNS)


STILL = ("data.samples_per_epoch=6", "optim.lr=1e-30", "model.recycling_steps=0", "trainer.gradient_clip_val=null")
"""Epochs of six samples. At a rate of almost 0 the gradient of each step is that of its samples alone."""


@pytest.mark.parametrize(
    ("batch_size", "given"),
    [(2, ()), pytest.param(1, ("trainer.limit_train_batches=5",), marks=pytest.mark.slow)],
    ids=["ends", "cut short"],
)
def test_the_last_step_of_an_epoch(run, batch_size, given):
    """It has what four samples leave over: two, or one where the epoch is cut short."""
    second = run(1, 1, 1, 1, 4, *STILL, *given)[1]
    number = 4 // batch_size
    alone = run(1, 1, 1, batch_size, 1, *STILL, f"trainer.max_steps={number + 1}")[number]
    for name in ("train/loss", "grad_norm", "tokens"):
        assert float(second[name]) == pytest.approx(float(alone[name]), rel=1e-8), name
