"""Ending a process at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from contextlib import suppress
from typing import NoReturn


def say(text: str, stream: str = "stderr") -> None:
    """Print a line at once, where somebody still reads: what a pipe went to may have ended, by the same Ctrl-C."""
    with suppress(OSError, ValueError):
        print(text, file=getattr(sys, stream), flush=True)


def end_process(code: int) -> NoReturn:
    """End this process without its exit handlers, which may wait for ranks that are gone.

    Of what they do, two things are done: output is written, and the folder is removed in which ``multiprocessing`` has
    put the sockets of data workers, where it is this process's own: one that ``multiprocessing`` has started may have
    its parent's.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    folder = getattr(multiprocessing.current_process(), "_config", {}).get("tempdir")
    if folder and multiprocessing.parent_process() is None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)
