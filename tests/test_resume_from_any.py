"""Whatever checkpoint a run is resumed from, it goes on as if it had never stopped."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from cpfold_train.cli import train as entry
from tests.test_micro_batches import COLUMNS, STEPS
from tests.test_training_runs import assert_same_curve, rows_of

RUN = [
    *STEPS,
    "cp.grid=1x1",
    "data.val=[tests/data/*.tar]",
    "diffusion.validation_steps=0",
    "data.samples_per_epoch=5",
    "trainer.accumulate_grad_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.max_steps=8",
    "checkpoint.every_n_steps=1",
]
"""Five batches an epoch, in steps of two, two and one."""
BY_EPOCH = "trainer.check_val_every_n_epoch=1"
VALIDATED = {
    # After batches 3 and 6, which are within a step, 9, which is not, and 12.
    "every 3 batches": ("trainer.val_check_interval=3",),
    "within the second step of an epoch": (BY_EPOCH, "trainer.val_check_interval=3"),
    "at the end of an epoch": ("trainer.val_check_interval=5",),
    "after an epoch": (BY_EPOCH, "trainer.val_check_interval=1.0"),
    "after every second epoch": ("trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=1.0"),
    "after an epoch that is cut short": (BY_EPOCH, "trainer.val_check_interval=1.0", "trainer.limit_train_batches=3"),
}
VALIDATION = ("val/loss", "val/distogram")


def keeps_all() -> None:
    """``train.py`` that keeps every checkpoint that it writes, and takes each validation for the best one."""
    import lightning.pytorch as pl

    from cpfold_train.cli import run

    save = pl.Trainer.save_checkpoint

    def save_and_keep(self: pl.Trainer, filepath: str | Path, *args: object, **kwargs: object) -> None:
        save(self, filepath, *args, **kwargs)
        kind = Path(filepath).name.split("-")[0].removesuffix(".ckpt")
        kept = Path(filepath).parents[1] / "kept" / f"{kind}-{self.global_step}.ckpt"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(filepath, kept)

    pl.Trainer.save_checkpoint = save_and_keep
    run.ModelCheckpoint = functools.partial(run.ModelCheckpoint, save_top_k=-1)
    entry.main()


@pytest.fixture(scope="module")
def whole(forked_runs, tmp_path_factory):
    """Directory and rows of a whole run that is validated as one of :data:`VALIDATED` says."""

    @functools.cache
    def start(validated: str) -> tuple[Path, list[dict[str, str]]]:
        run_dir = tmp_path_factory.mktemp("whole")
        given = [*RUN, *VALIDATED[validated], f"hydra.run.dir={run_dir}"]
        return run_dir, rows_of(forked_runs.run(1, given, f"{__name__}:keeps_all"), run_dir)

    return start


def assert_goes_on(forked_runs, whole, validated: str, kept: str, run_dir: Path, *more: str) -> None:
    """Of the validation that wrote the checkpoint there is no second record."""
    folder, rows = whole(validated)
    arguments = [*RUN, *VALIDATED[validated], f"ckpt_path={folder}/kept/{kept}.ckpt", f"hydra.run.dir={run_dir}"]
    resumed = rows_of(forked_runs.run(1, [*arguments, *more]), run_dir)
    step = int(kept.split("-")[1])
    assert_same_curve(resumed, [row for row in rows if int(row["step"]) > step], *COLUMNS, *VALIDATION)


@pytest.mark.parametrize("kept", ["best-2", pytest.param("last-4", marks=pytest.mark.slow)])
def test_validation_amid_a_step(forked_runs, whole, tmp_path, kept):
    """Its checkpoint is of a whole step."""
    folder, rows = whole("every 3 batches")
    assert [row["step"] for row in rows if row["val/loss"]] == ["2", "4", "5", "7"]
    assert sorted(path.stem for path in (folder / "checkpoints").glob("best*")) == [
        f"best-step-{step}" for step in (2, 4, 5, 7)
    ]
    assert_goes_on(forked_runs, whole, "every 3 batches", kept, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("validated", VALIDATED)
def test_any_checkpoint(forked_runs, whole, tmp_path, validated):
    folder, _ = whole(validated)
    kept = sorted(path.stem for path in (folder / "kept").iterdir() if path.stem.split("-")[1] != "8")
    assert {name.split("-")[0] for name in kept} == {"best", "last"}
    for name in kept:
        assert_goes_on(forked_runs, whole, validated, name, tmp_path / name)
