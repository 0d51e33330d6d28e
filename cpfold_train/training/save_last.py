"""When checkpoints are written: between two steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from cpfold_train.training.lightning_loop import (
    accumulates,
    around_end_of_batch,
    before_each_batch,
    begin_next_epoch,
    between_steps,
    count_micro_batches_from,
    ends_within_epoch,
    resume_at,
    validate_between_steps,
)


class SaveLast(Checkpoint):
    """Saves every so many optimizer steps and at the end, when all that belongs to the step is done.

    Its validation belongs to it: what is best so far, and how long nothing has improved, are part of a checkpoint.
    Lightning 2.6's own callback saves before validation, which a resumed run then leaves out; it saves at the end only
    what was never saved before; and resumed, it saves between two micro-batches of a step, whose gradients are in no
    checkpoint. So a run that is asked to stop there, by ``max_time``, stops at the end of the step, and a validation
    that is due there, which writes the best checkpoint, is made at the end of the step.

    Args:
        path: of the checkpoint.
        every: optimizer steps between two.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self._every = path, every
        self._saved = 0
        self._stop = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        before_each_batch(trainer, partial(self._before_batch, trainer))
        around_end_of_batch(trainer, partial(self._end_of_batch, trainer))
        validate_between_steps(trainer)
        count_micro_batches_from(trainer, lambda: trainer.train_dataloader.first)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        loader = trainer.train_dataloader
        if loader.resumed:
            # With other replicas the epoch has other batches, and with other samples another one begins.
            resume_at(trainer, loader.epoch, loader.position)
            if trainer.is_global_zero:
                print(loader.told, file=sys.stderr)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The loader is still at the end of the last one.
        trainer.train_dataloader.set_epoch(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved:
            # The run has ended with an epoch.
            trainer.train_dataloader.set_epoch(trainer.current_epoch)
            begin_next_epoch(trainer)
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save, on all ranks together, where there are steps that are in no checkpoint of this run; not in a
        ``fast_dev_run``."""
        if trainer.global_step > self._saved and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def _before_batch(self, trainer: Trainer) -> None:
        if between_steps(trainer) and trainer.global_step % self._every == 0:
            self.save(trainer)

    def _end_of_batch(self, trainer: Trainer, end: Callable[[], None]) -> None:
        if accumulates(trainer):
            self._stop |= trainer.should_stop
            trainer.should_stop = False
            end()
            return
        end()
        trainer.should_stop |= self._stop
        if ends_within_epoch(trainer):
            # Lightning counts the epoch as a whole one from here on.
            self.save(trainer)
