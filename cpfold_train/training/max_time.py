"""Ending a run after so much time."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer


class MaxTime(Timer):
    """Ends the run when its training has taken so long, all starts together, and says so.

    The time is part of checkpoints: a run that has ended like this and is started again makes no step, unless it is
    given more.

    Args:
        duration: ``DD:HH:MM:SS``.
    """

    def __init__(self, duration: str) -> None:
        super().__init__(duration, verbose=False)
        self._typed = duration

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.time_remaining() <= 0:
            print(
                f"stopped at step {trainer.global_step}: trainer.max_time={self._typed} is over, which all starts of a "
                "run share; type a larger one to go on"
            )
