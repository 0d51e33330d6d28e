"""What a phase finds: written after each entry, so that a phase that is killed leaves what it has."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpfold_train.errors import in_one_line
from cpfold_train.whole_file import whole_file

Measured = dict[str, Any]


class Record:
    """Entries of one phase, by name.

    Args:
        file: JSON that is written.
        deadline: of ``time.monotonic()``: until when the phase is to end by itself.

    Attributes:
        found: what is written: ``entries``, ``failures`` and what is ``doing``.
    """

    def __init__(self, file: Path, deadline: float) -> None:
        self._file, self._deadline = file, deadline
        self.found: Measured = {"entries": {}, "failures": [], "left_out": [], "doing": ""}

    @property
    def time_left(self) -> float:
        """Seconds until the phase is to end."""
        return self._deadline - time.monotonic()

    def add(self, name: str, /, **measured: Any) -> None:
        """Write an entry, or add to it."""
        self.found["entries"].setdefault(name, {}).update(measured)
        self._write()

    def fail(self, name: str, reason: str) -> None:
        """Write that something is not as it must be."""
        self.found["failures"].append(f"{name}: {reason}")
        self._write()

    def at(self, doing: str) -> None:
        """Write what is being done, for the process that waits."""
        self.found["doing"] = doing
        self._write()

    def attempt(self, name: str, call: Callable[..., None], *args: Any, seconds: float = 0.0) -> None:
        """``call(*args)``, which may fail without harm to what comes after it.

        Args:
            name: of the entry that it makes.
            call: what is done.
            seconds: that it takes at least; where fewer are left, it is left out.
        """
        if self.time_left < seconds:
            self.found["left_out"].append(name)
            self._write()
            return
        self.at(name)
        try:
            call(*args)
        except Exception as error:
            traceback.print_exc()
            self.fail(name, in_one_line(error))
        finally:
            self.at("")
            release()

    def _write(self) -> None:
        with whole_file(self._file) as text:
            json.dump(self.found, text, indent=1)


def release() -> None:
    """Give memory back that nobody holds, after an error above all."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
