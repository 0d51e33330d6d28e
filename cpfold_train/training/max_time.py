"""Ending a run after so much time."""

from __future__ import annotations

from lightning.pytorch.callbacks import Timer


class MaxTime(Timer):
    """Ends the run when its training has taken so long, all starts together.

    The time is part of checkpoints: a run that has ended like this and is started again makes no step, unless it is
    given more.

    Args:
        duration: ``DD:HH:MM:SS``; None only counts, for a later start that has one.
    """

    def __init__(self, duration: str | None) -> None:
        super().__init__(duration, verbose=False)
        self._typed = duration

    def reason(self, step: int) -> str:
        """Why the run ends at a step; empty where it is not for this."""
        if self._typed is None or self.time_remaining() > 0:
            return ""
        return (
            f"stopped at step {step}: trainer.max_time={self._typed} is over, which all starts of a run share; type a "
            "larger one to go on"
        )
