"""When ``last.ckpt`` is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

Advance = Callable[[object], None]


class SaveLast(Checkpoint):
    """Saves every so many optimizer steps and at the end, when all that belongs to the step is done.

    Its validation belongs to it: what is best so far, and how long nothing has improved, are part of a checkpoint.
    Lightning 2.6's own callback saves before validation, which a resumed run then leaves out; it saves at the end only
    what was never saved before; and resumed, it saves between two micro-batches of a step, whose gradients are in no
    checkpoint. So a run that is asked to stop there, by ``max_time`` or early stop, stops at the end of the step.

    Args:
        path: of the checkpoint.
        every: optimizer steps between two.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self._every = path, every
        self._saved = 0
        self._stop = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loop = trainer.fit_loop.epoch_loop
        # No hook lies between the last thing that belongs to a step and the next batch, or the end.
        loop.advance = partial(self._advance, trainer, loop.advance)
        loop.on_advance_end = partial(self._advance_end, trainer, loop.on_advance_end)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        if trainer.train_dataloader.resumed:
            # With other replicas the epoch has other batches, of which Lightning keeps count by itself.
            done = trainer.fit_loop.epoch_loop.batch_progress.current
            moved = trainer.train_dataloader.position - done.ready
            for count in ("ready", "started", "processed", "completed"):
                setattr(done, count, getattr(done, count) + moved)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where the last one was cut short by ``trainer.limit_train_batches`` the loader is still in it.
        trainer.train_dataloader.set_epoch(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved:
            # The run has ended with an epoch. Lightning does not resume that well, but it does the start of the next.
            loop = trainer.fit_loop
            trainer.train_dataloader.set_epoch(trainer.current_epoch)
            loop.epoch_progress.increment_ready()
            loop.epoch_progress.increment_started()
            loop.epoch_loop.reset()
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save, on all ranks together, where there are steps that are in no checkpoint of this run; not in a
        ``fast_dev_run``."""
        if trainer.global_step > self._saved and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def _advance(self, trainer: Trainer, advance: Advance, data_fetcher: object) -> None:
        if between_steps(trainer) and trainer.global_step % self._every == 0:
            self.save(trainer)
        advance(data_fetcher)

    def _advance_end(self, trainer: Trainer, advance_end: Advance, data_fetcher: object) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            self._stop_later(trainer)
            # Validation, which may ask to stop.
            advance_end(data_fetcher)
            self._stop_later(trainer)
            return
        advance_end(data_fetcher)
        trainer.should_stop |= self._stop
        if loop.done and not loop._num_ready_batches_reached():
            # Amidst an epoch, which Lightning counts as a whole one from here on.
            self.save(trainer)

    def _stop_later(self, trainer: Trainer) -> None:
        self._stop |= trainer.should_stop
        trainer.should_stop = False


def between_steps(trainer: Trainer) -> bool:
    """Whether the micro-batches so far are those of whole steps."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0
