"""What a run does when it is asked to end: it saves after the step at hand, and ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer

from cpfold_train.config.check_checkpoint import checkpoint_to_resume
from cpfold_train.config.quoting import typed
from cpfold_train.config.world import started_by_slurm, started_by_torchrun
from cpfold_train.faults.restart import AutoRestart
from cpfold_train.interrupts import answer_interrupts, leave_interrupts, quit_now
from cpfold_train.parallel.gather import barrier, on_any_rank
from cpfold_train.processes import say
from cpfold_train.reports.shell import command, shown
from cpfold_train.training.lightning_loop import before_each_batch, between_steps, leave_signals_alone
from cpfold_train.training.save_last import SaveLast


class SaveOnSigterm(Callback):
    """SIGTERM to any rank: all save ``last.ckpt`` when the optimizer step at hand is done, and end with exit code 143.

    Ctrl-C does the same with exit code 130, and a second one ends all at once. Under SLURM, SIGUSR1 does what SIGTERM
    does and puts the job into the queue again (``#SBATCH --signal=USR1@300``).

    Lightning 2.6 answers signals from inside their handlers, by a broadcast or a checkpoint that meet whatever the
    other ranks are sending. Here a handler only takes a note, and the ranks agree between two steps; this replaces
    the broadcast with which Lightning asks for SIGTERM before every batch.

    Args:
        last: saves.
        again: what would start the run again after an error; no longer, once the run was asked to end.
    """

    def __init__(self, last: SaveLast, again: AutoRestart | None) -> None:
        self._last, self._again = last, again
        self._asked: set[int] = set()
        self._speaks = False
        self._worked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        before_each_batch(trainer, partial(self._before_batch, trainer))
        leave_signals_alone(trainer)
        signals = [signal.SIGTERM] + [signal.SIGUSR1] * ("SLURM_JOB_ID" in os.environ)
        for number in signals:
            signal.signal(number, self._note)
        self._speaks = trainer.is_global_zero
        answer_interrupts(self._interrupt)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on there is nothing left to save."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        leave_interrupts(self._interrupt)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        self._worked = True

    def _note(self, number: int, frame: object = None) -> None:
        self._asked.add(number)
        if self._again is not None:
            self._again.allowed = False

    def _interrupt(self) -> None:
        """In a thread of its own: the main thread may wait for other ranks."""
        if signal.SIGINT in self._asked:
            quit_now("ended at once" if self._speaks else "")
        self._note(signal.SIGINT)
        if self._speaks:
            told = "interrupted: the run saves after the step at hand and ends; Ctrl-C again ends it at once"
            say(f"\n{told}")

    def _before_batch(self, trainer: Trainer) -> None:
        # Between two batches of one step there is nothing to save: gradients are in no checkpoint.
        if between_steps(trainer) and on_any_rank(trainer.strategy.cp, bool(self._asked)):
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        step = trainer.global_step
        self._last.save(trainer)
        if trainer.is_global_zero:
            kept = self._worked and not trainer.fast_dev_run
            saved = f"saved {self._last.path} at step {step}" if kept else f"nothing to save at step {step}"
            say(f"asked to end: {saved}{self._how_to_go_on()}")
        if on_any_rank(trainer.strategy.cp, signal.SIGUSR1 in self._asked) and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        interrupted = on_any_rank(trainer.strategy.cp, signal.SIGINT in self._asked)
        # The first rank that ends may have the others killed.
        barrier(trainer.strategy.cp)
        sys.exit(128 + (signal.SIGINT if interrupted else signal.SIGTERM))

    def _how_to_go_on(self) -> str:
        run_dir = self._last.path.parents[1]
        if checkpoint_to_resume("last", run_dir) is None:
            return ""
        if started_by_torchrun() or started_by_slurm():
            return f"; to go on, type the same command with {typed('resume', str(run_dir))} instead of its keys"
        return f"; to go on, type: {shlex.join(command('resume', shown(run_dir)))}"
