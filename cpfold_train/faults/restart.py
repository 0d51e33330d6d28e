"""A run that starts again by itself, after a rank had no memory for a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from cpfold_train.checkpoints.sharded import INDEX
from cpfold_train.config.quoting import hydra_quoted

OUT_OF_MEMORY_FILE = "out_of_memory.txt"
"""In the run directory: the steps for which a rank had no memory, one a line, counted from 1."""


def steps_out_of_memory(run_dir: Path) -> set[int]:
    """The steps that are to be skipped, because a rank had no memory for them."""
    noted = run_dir / OUT_OF_MEMORY_FILE
    return {int(step) for step in noted.read_text().split()} if noted.exists() else set()


class AutoRestart:
    """Lets the process that started the ranks begin again, as if its command were typed once more in the run
    directory.

    The process replaces itself: what started it and waits for it, or sends it signals, sees one run, while memory,
    threads and connections of the failed start are gone. To be made before anything of the run is, since the new start
    gets the environment of this moment, in which no rank, port or world is set.

    Args:
        run_dir: of the run, which the new start gets by name.

    Attributes:
        allowed: False once somebody has asked the run to end.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._env = dict(os.environ)
        self._known = steps_out_of_memory(run_dir)
        self._last = run_dir / "checkpoints" / "last.ckpt"
        self._before = self._written()
        self._children = set(psutil.Process().children())
        self._files = _open_files()
        self.allowed = True

    def after_out_of_memory(self) -> None:
        """Start again where this start has found a step without memory, and do not return; else do nothing.

        A step that was known before was to be skipped, and one that is not noted was none: starting again would come to
        the same point.
        """
        new = steps_out_of_memory(self._run_dir) - self._known
        if not new or not self.allowed:
            return
        overrides, start = [f"hydra.run.dir={hydra_quoted(self._run_dir)}"], "where it began"
        if self._written() != self._before:
            # Not what another run has left in the directory, which this one was not told to go on from.
            overrides.append(f"ckpt_path={hydra_quoted(self._last)}")
            start = str(self._last)
        steps = ", ".join(map(str, sorted(new)))
        print(
            f"a rank had no memory for step {steps}: the run starts again from {start} and skips it on all ranks",
            file=sys.stderr,
        )
        self._end_children()
        for file in _open_files() - self._files:
            # Sockets of the failed ranks, which torch would leave open.
            with suppress(OSError):
                os.set_inheritable(file, False)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *_typed_again(sys.orig_argv[1:], overrides)], self._env)

    def _written(self) -> int | None:
        # Of FSDP it is a directory, whose index says when it was complete.
        file = self._last / INDEX if self._last.is_dir() else self._last
        return file.stat().st_mtime_ns if file.exists() else None

    def _end_children(self) -> None:
        """Data workers and others that this start has begun: they look for the end of a process that does not end."""
        if threading.current_thread() is threading.main_thread():
            # torch would raise an error about data workers that end; where the main thread hangs, it cannot.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        children = [child for child in psutil.Process().children() if child not in self._children]
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=10)


def _open_files() -> set[int]:
    return {int(name) for name in os.listdir("/dev/fd")}


def _typed_again(command: list[str], overrides: list[str]) -> list[str]:
    """The command with more overrides, right after its own: Hydra takes them in one row, without options between."""
    own = [i for i, word in enumerate(command) if "=" in word and not word.startswith("-")]
    end = own[-1] + 1 if own else len(command)
    return [*command[:end], *overrides, *command[end:]]
