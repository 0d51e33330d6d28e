"""What a strategy does about faults of single ranks, whatever way it trains."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import NoReturn

from cpfold_train.errors import ConfigError, DataError, RunError, in_one_line
from cpfold_train.faults.anomaly import anomaly_sentence
from cpfold_train.faults.out_of_memory import is_out_of_memory, out_of_memory_sentence
from cpfold_train.faults.restart import AutoRestart
from cpfold_train.parallel.flight_recorder import keep_dumps_in
from cpfold_train.parallel.watch import GRACE, Watch, abort_exchanges
from cpfold_train.processes import end_process
from cpfold_train.whole_file import is_disk_full


class FaultMixin:
    """To be inherited before a Lightning strategy, which calls :meth:`start_watch` once it has its ``cp``, and whose
    ``launcher`` can ``end_ranks``.

    Attributes:
        fault: after a failure, a sentence on the rank that caused it, where that is another one.
        again: what can start the run again after an error, where this process is the one to do so.
        faults: directory for what ranks write when an exchange takes too long; None where they are to write nothing.
    """

    watch: Watch | None = None
    fault: str | None = None
    again: AutoRestart | None = None
    faults: Path | None = None

    def setup_distributed(self) -> None:
        if self.faults is not None and self.root_device.type == "cuda":
            keep_dumps_in(self.faults)
        super().setup_distributed()

    def start_watch(self) -> None:
        """Let this rank be seen by the others, and learn when one of them fails."""
        self.watch = Watch(self.cp, self._end_at_once, self.faults)

    def note(self, error: BaseException) -> None:
        """Find out which rank is the cause of an error, and tell the others."""
        if self.watch is None or isinstance(error, SystemExit):
            return
        # NCCL's buffers too are memory of this rank, whatever the error says of it.
        self.fault = None if is_out_of_memory(error) else self.watch.explain(error)
        self.watch.report(self.fault or f"rank {self.global_rank} failed: {describe(error)}")

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.watch is not None:
            self.watch.stop()
        # All that is to be told of an error is written by now. What follows, moving the model to the host and
        # destroying the process groups, would wait for exchanges with ranks that have failed, or that wait for this
        # one.
        if not isinstance(exception, SystemExit) and not abort_exchanges(GRACE):
            traceback.print_exception(exception)
            self._end_at_once(self.fault or describe(exception))
        self.launcher.end_ranks()

    def teardown(self) -> None:
        if self.watch is not None:
            self.watch.stop()
        super().teardown()

    def _end_at_once(self, fault: str) -> NoReturn:
        """For a rank that hangs while another has failed, or cannot leave what it has failed in."""
        print(f"error: rank {self.global_rank} was ended because {fault}", file=sys.stderr, flush=True)
        self.launcher.end_ranks(patience=0.0)
        try:
            if self.again is not None:
                self.again.after_out_of_memory()
        finally:
            end_process(1)


def describe(error: BaseException) -> str:
    """One line on an error."""
    if isinstance(error, (ConfigError, DataError, RunError)):
        return str(error)
    if is_out_of_memory(error):
        return out_of_memory_sentence(error)
    if is_disk_full(error):
        return "the disk is full"
    return anomaly_sentence(error) or in_one_line(error)
