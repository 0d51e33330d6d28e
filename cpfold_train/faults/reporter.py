"""What is said of a run that cannot go on."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.checkpoints.sharded import remove_unfinished
from cpfold_train.errors import RunError
from cpfold_train.faults.anomaly import anomaly_sentence
from cpfold_train.faults.out_of_memory import is_out_of_memory, out_of_memory_sentence
from cpfold_train.whole_file import disk_full_sentence, is_disk_full, remove_partial_files

FAULTS = "faults"
"""In the run directory: what ranks have written that failed or waited for too long."""


class FaultReporter(Callback):
    """Before the other callbacks that care for errors, so that the others know whose fault it was: an error goes to all
    ranks.

    Args:
        checkpoints: directory of the checkpoints, which is cleaned of what a killed process left half written.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            remove_partial_files(self._checkpoints)
            remove_unfinished(self._checkpoints)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.strategy.note(exception)


def sentence_on(error: Exception, run_dir: Path) -> str | None:
    """What to say of a known kind of failure of this rank; None where only a traceback can say it.

    Args:
        error: that ended the run.
        run_dir: where the run writes.
    """
    if isinstance(error, RunError):
        return str(error)
    if is_disk_full(error):
        return disk_full_sentence(run_dir / "metrics.csv")
    if is_out_of_memory(error):
        return out_of_memory_sentence(error)
    return anomaly_sentence(error)
