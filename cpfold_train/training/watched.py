"""What a strategy does about faults of single ranks, whatever way it trains."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch

from cpfold_train.errors import ConfigError, DataError, RunError
from cpfold_train.parallel.watch import Watch
from cpfold_train.training.launcher import RankLauncher
from cpfold_train.training.restart import StartAgain
from cpfold_train.whole_file import is_disk_full

OUT_OF_MEMORY = (
    "out of memory: the same command with ckpt_path=last goes on and skips the steps noted in out_of_memory.txt; where "
    "it happens often, or not in a training step, type a smaller crop_size or a larger cp.grid"
)


class Watched:
    """To be inherited before a Lightning strategy, which calls :meth:`start_watch` once it has its ``cp``.

    Attributes:
        fault: after a failure, a sentence on the rank that caused it, where that is another one.
        again: what can start the run again after an error, where this process is the one to do so.
    """

    watch: Watch | None = None
    fault: str | None = None
    again: StartAgain | None = None

    def _configure_launcher(self) -> None:
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def start_watch(self) -> None:
        """Let this rank be seen by the others, and learn when one of them fails."""
        self.watch = Watch(self.cp, self._end_at_once)

    def note(self, error: BaseException) -> None:
        """Find out which rank is the cause of an error, and tell the others."""
        if self.watch is None or isinstance(error, SystemExit):
            return
        self.fault = self.watch.explain(error)
        self.watch.report(self.fault or f"rank {self.global_rank} failed: {describe(error)}")

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.watch is not None:
            self.watch.stop()
        self.launcher.end_ranks()

    def teardown(self) -> None:
        if self.watch is not None:
            self.watch.stop()
        super().teardown()

    def _end_at_once(self, fault: str) -> NoReturn:
        """For a rank that hangs while another has failed."""
        print(f"error: rank {self.global_rank} was ended because {fault}", file=sys.stderr, flush=True)
        self.launcher.end_ranks(patience=0.0)
        try:
            if self.again is not None:
                self.again.after_out_of_memory()
        finally:
            os._exit(1)


def describe(error: BaseException) -> str:
    """One line on an error."""
    if isinstance(error, (ConfigError, DataError, RunError)):
        return str(error)
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if is_disk_full(error):
        return "the disk is full"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, found no memory on the device or on the host."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
