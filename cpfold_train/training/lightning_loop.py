"""All that depends on how Lightning 2.6 is made inside: its training loop, its answer to signals, its launcher.

No other file touches a private name of Lightning, or replaces a method of an object of its. :data:`USED` lists what
must be there; ``tests/test_lightning_loop.py`` names what a new release no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _ProcessedTracker, _Progress
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

USED: dict[type, tuple[str, ...]] = {
    _TrainingEpochLoop: (
        "advance",
        "on_advance_end",
        "reset",
        "done",
        "_accumulated_batches_reached",
        "_should_accumulate",
        "_should_check_val_fx",
        "_num_ready_batches_reached",
        "_broadcast_sigterm_tensor",
    ),
    _SignalConnector: ("register_signal_handlers",),
    _Progress: ("increment_ready", "increment_started"),
    _ProcessedTracker: ("ready", "started", "processed", "completed"),
    _SubprocessScriptLauncher: ("launch", "_call_children_scripts"),
    DDPStrategy: ("_configure_launcher", "launcher"),
}
"""Names of classes that are called, read or replaced here."""
ATTRIBUTES = {
    "fit_loop": _FitLoop,
    "fit_loop.epoch_loop": _TrainingEpochLoop,
    "fit_loop.epoch_progress": _Progress,
    "fit_loop.epoch_loop.batch_progress": _Progress,
    "fit_loop.epoch_loop.batch_progress.current": _ProcessedTracker,
    "_signal_connector": _SignalConnector,
}
"""Of a trainer, and what each of them is."""
_COUNTS = USED[_ProcessedTracker]


def before_each_batch(trainer: Trainer, call: Callable[[], None]) -> None:
    """Call this before every batch of training is fetched, where all that belongs to the batch before it is done, its
    validation included. No hook of a callback lies there. What is asked for last is called first."""
    loop = trainer.fit_loop.epoch_loop
    advance = loop.advance

    def advance_after_call(data_fetcher: object) -> None:
        call()
        advance(data_fetcher)

    _replace(loop, "advance", advance_after_call)


def around_end_of_batch(trainer: Trainer, around: Callable[[Callable[[], None]], None]) -> None:
    """Call this instead of what ends a batch, its validation included; it is given what it stands for."""
    loop = trainer.fit_loop.epoch_loop
    end = loop.on_advance_end
    _replace(loop, "on_advance_end", lambda data_fetcher: around(partial(end, data_fetcher)))


def validate_between_steps(trainer: Trainer) -> None:
    """Have a validation that is due between two micro-batches of a step wait until the step is done."""
    loop = trainer.fit_loop.epoch_loop
    is_due, waits = loop._should_check_val_fx, False

    def is_due_now(data_fetcher: object) -> bool:
        nonlocal waits
        waits |= is_due(data_fetcher)
        if loop._should_accumulate():
            return False
        due, waits = waits, False
        return due

    _replace(loop, "_should_check_val_fx", is_due_now)


def leave_signals_alone(trainer: Trainer) -> None:
    """Have Lightning do nothing about signals: no handlers, and no broadcast before each batch that asks for one."""
    _replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", _nothing)
    _replace(trainer._signal_connector, "register_signal_handlers", _nothing)


def count_micro_batches_from(trainer: Trainer, first: Callable[[], int]) -> None:
    """Let the steps of an epoch begin with this batch of it: Lightning counts from 0, also where an epoch was resumed
    with other batches."""
    loop = trainer.fit_loop.epoch_loop
    _replace(loop, "_accumulated_batches_reached", lambda: _of_step(trainer, first()) == 0)


def _of_step(trainer: Trainer, first: int) -> int:
    return (trainer.fit_loop.epoch_loop.batch_progress.current.ready - first) % trainer.accumulate_grad_batches


def between_steps(trainer: Trainer) -> bool:
    """Whether the micro-batches so far are those of whole steps."""
    return trainer.fit_loop.epoch_loop._accumulated_batches_reached()


def accumulates(trainer: Trainer) -> bool:
    """Whether the micro-batch at hand is not the last one of its step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def micro_batches(trainer: Trainer, first: int) -> int:
    """Of the step at hand: fewer than ``accumulate_grad_batches`` where the epoch ends before.

    Args:
        trainer: of the run.
        first: batch of the epoch from which steps are counted.
    """
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
    start = done - (done - first) % trainer.accumulate_grad_batches
    return min(trainer.accumulate_grad_batches, int(trainer.num_training_batches) - start)


def ends_within_epoch(trainer: Trainer) -> bool:
    """Whether training is to end here, and the epoch has more batches."""
    loop = trainer.fit_loop.epoch_loop
    return loop.done and not loop._num_ready_batches_reached()


def resume_at(trainer: Trainer, epoch: int, position: int) -> None:
    """Let a run that resumes be at this batch of this epoch: Lightning keeps count of its own.

    Args:
        trainer: of the run, before its first epoch begins.
        epoch: the one of the checkpoint, or a later one.
        position: batches of it that were done.
    """
    batches, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress
    if batches.is_last_batch:
        # Of the epoch before; Lightning itself goes on with the next one.
        position = int(trainer.num_training_batches)
    _move(batches.current, position - batches.current.ready)
    later = epoch - trainer.current_epoch
    for counts in (epochs.total, epochs.current):
        _move(counts, later)


def _move(counts: _ProcessedTracker, moved: int) -> None:
    for count in _COUNTS:
        setattr(counts, count, getattr(counts, count) + moved)


def begin_next_epoch(trainer: Trainer) -> None:
    """Count the start of the next epoch, so that a checkpoint is of that: Lightning does not resume well at the end of
    one."""
    loop = trainer.fit_loop
    loop.epoch_progress.increment_ready()
    loop.epoch_progress.increment_started()
    loop.epoch_loop.reset()


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of a process for each rank of this machine, what it is made of under public names."""

    def start_ranks(self) -> None:
        """Start the same command again for each other rank of this machine; their processes are ``procs``."""
        self._call_children_scripts()

    def limit_threads(self) -> None:
        """Let the ranks of this machine have as many threads together as it has cores, unless the user has said."""
        _set_num_threads_if_needed(num_processes=self.num_processes)


class OwnLauncher:
    """To be inherited before a Lightning strategy that starts its ranks by what :meth:`make_launcher` returns."""

    def _configure_launcher(self) -> None:
        self._launcher = self.make_launcher()


def missing() -> list[str]:
    """What of this Lightning is not there any more, by name."""
    names = [f"{owner.__name__}.{name}" for owner, names in USED.items() for name in names if not _has(owner, name)]
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    for path, kind in ATTRIBUTES.items():
        found: Any = trainer
        for name in path.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, kind):
            names.append(f"Trainer.{path}, a {kind.__name__}")
    return names


def _has(owner: type, name: str) -> bool:
    return hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", ())


def _replace(owner: object, name: str, method: Callable) -> None:
    """Replace a method of one object.

    Raises:
        AttributeError: it has none of the name, so that nothing would call what is put there.
    """
    getattr(owner, name)
    setattr(owner, name, method)


def _nothing(*args: object) -> None:
    """Instead of what Lightning would do."""
