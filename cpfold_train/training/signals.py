"""What a run does when it is asked to end."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer


class EndOnSigterm(Callback):
    """SIGTERM ends this rank as an exception would, and with it the others.

    Lightning 2.6 answers SIGTERM by a broadcast from inside the signal handler. It meets whatever collective the other
    ranks are in, and all of them wait forever. Under SLURM its handler, which ignores the signal for the sake of
    requeueing, stays.
    """

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _install()


def _install() -> None:
    """To be called after Lightning has set its own handlers, which is just before the first batch."""
    if "SLURM_JOB_ID" not in os.environ:
        signal.signal(signal.SIGTERM, _end)


def _end(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)
