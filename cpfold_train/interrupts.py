"""Ctrl-C, from the first moment of a command on.

Python answers SIGINT by an exception, wherever the main thread is, once it comes back from what it waits for: within
an import it becomes a traceback, and within an exchange with other ranks nothing happens at all. Here a thread gets to
know of it at once, by the file descriptor to which Python writes the numbers of signals.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker

import psutil

from cpfold_train.processes import end_process, say

EXIT_CODE = 128 + signal.SIGINT

_answers: list[Callable[[], None]] = []
"""What is done about the next SIGINT, last; empty where Python's own answer holds."""


def quit_on_interrupt(speaks: Callable[[], bool] = lambda: True) -> None:
    """Let SIGINT end this process and all that it has started, with one line. For the main thread of a command.

    Args:
        speaks: whether it is this process that says so.
    """

    def answer() -> None:
        quit_now("interrupted" if speaks() else "")

    _answers.append(answer)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    # What this process starts inherits that, and is ended by it, if it does not listen for itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_listen, args=(reads,), daemon=True, name="interrupts").start()
    # What is forked must not write to the pipe.
    os.register_at_fork(after_in_child=_ignore)


def answer_interrupts(answer: Callable[[], None]) -> None:
    """Call this, in a thread of its own, for each SIGINT from now on, where a command has :func:`quit_on_interrupt`."""
    if _answers:
        _answers.append(answer)


def before_spawning() -> None:
    """To be called before ``multiprocessing`` spawns processes: its first one lets SIGINT through to all of them, which
    would end in tracebacks, and this process ends them anyway."""
    if _answers:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def leave_interrupts(answer: Callable[[], None]) -> None:
    """Take back :func:`answer_interrupts`."""
    if answer in _answers:
        _answers.remove(answer)


def quit_now(sentence: str) -> None:
    """End all that this process has started, and the process itself, after a sentence."""
    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    if sentence:
        say(f"\n{sentence}")
    if children:
        # Once this process is gone: torch would raise an error in its main thread about data workers that end.
        os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep 0.1; kill -KILL {' '.join(children)} 2>/dev/null"], os.environ)
    end_process(EXIT_CODE)


def _listen(reads: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    while number := os.read(reads, 1):
        if number[0] == signal.SIGINT:
            _answers[-1]()


def _ignore() -> None:
    _answers.clear()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
