"""A phase in a process of its own: neither an error nor a hang in it takes the others."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cpfold_train.errors import in_one_line
from cpfold_train.gpu_check.record import Record
from cpfold_train.processes import end_process

GRACE_S = 5.0
"""What a phase gets beyond its time before it is ended."""


def run_apart(
    work: Callable[[Record], None], file: Path, log: Path, limit_s: float, watch: Callable[[], None]
) -> str | None:
    """Run ``work(record)`` in a process of its own.

    The process is forked from this one, which must not have used a GPU: it would be of no use to its children.

    Args:
        work: of the phase.
        file: that its record writes.
        log: that gets what it prints.
        limit_s: seconds that it has.
        watch: is called again and again until it has ended.

    Returns:
        Why it has not come to its end, or None.
    """
    process = mp.get_context("fork").Process(target=_serve, args=(work, file, log, limit_s))
    process.start()
    deadline = time.monotonic() + limit_s + GRACE_S
    try:
        while process.is_alive() and time.monotonic() < deadline:
            process.join(0.1)
            watch()
    finally:
        alive = process.is_alive()
        if alive:
            # Its own children belong to its group.
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if alive:
        return f"it was ended after {limit_s + GRACE_S:.0f} s"
    if process.exitcode:
        return f"its process ended with exit code {process.exitcode}; {log.name} has what it printed"
    return None


def _serve(work: Callable[[Record], None], file: Path, log: Path, limit_s: float) -> None:
    os.setsid()
    # What there is by now is no garbage: looking through it after each entry would take longer than small phases do.
    gc.freeze()
    # Python's own streams and those of libraries, whatever they were in the process that this one comes from.
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    record = Record(file, time.monotonic() + limit_s)
    try:
        work(record)
        code = 0
    except Exception as error:
        traceback.print_exc()
        record.fail("phase", in_one_line(error))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # What process groups and CUDA do at exit may hang, and is none of the phase's results.
    end_process(code)
