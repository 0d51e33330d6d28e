"""Starting the ranks of one machine, and what becomes of them when one of them ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from cpfold_train.config.world import RANK_OF
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.rendezvous import open_rendezvous
from cpfold_train.processes import end_process
from cpfold_train.training.lightning_loop import ScriptLauncher

_PATIENCE = 25.0
"""Seconds after the end of a failed rank in which the others are to end by themselves."""


class RankLauncher(ScriptLauncher):
    """Lightning's launcher, but for what it does when a rank has ended, and for how the ranks find each other.

    Lightning kills all ranks, itself included, within five seconds: too soon for them to say why, and a run that ends
    on SIGTERM would look like one that crashed. Here they get time to tell what they know first.

    Lightning looks for a free port, starts the ranks, and listens on the port later, when somebody else may have it.

    In a notebook there is no command to start again for other ranks: a grid of one rank runs in its process.

    Raises:
        ConfigError: there is no such command, and there are to be other ranks.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ending = threading.Event()
        if is_interactive() and self.num_processes > 1:
            raise ConfigError(
                f"{self.num_processes} ranks cannot be started from a notebook or an interactive interpreter: "
                "cpfold_train.api.train starts them as processes of their own; GridStrategy(1, 1) runs in this one"
            )

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether Lightning may use it in a notebook: always, as those of several ranks are refused above."""
        return True

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            if "MASTER_PORT" not in os.environ:
                self._meeting_point = open_rendezvous()
                os.environ["MASTER_PORT"] = str(self._meeting_point.port)
            os.environ[RANK_OF] = str(os.getpid())
            self.start_ranks()
            threading.Thread(target=_guard, args=(self.procs, self._ending), daemon=True, name="ranks").start()
        self.limit_threads()
        return function(*args, **kwargs)

    def end_ranks(self, patience: float = 10.0) -> None:
        """End the ranks started here. They get some seconds to do so by themselves: where one of them is the cause, its
        traceback must reach the screen."""
        self._ending.set()
        deadline = time.monotonic() + patience
        for process in self.procs:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def is_interactive() -> bool:
    """Whether this is a notebook or an interpreter that somebody types into."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _guard(processes: list[subprocess.Popen], ending: threading.Event) -> None:
    """End this process and all ranks that it started, should they stay where one of them has failed."""
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return
        time.sleep(0.5)
    rank, code = next((i + 1, p.returncode) for i, p in enumerate(processes) if p.returncode)
    if ending.wait(_PATIENCE):
        return
    print(f"error: rank {rank} ended with exit code {code}, and rank 0 did not notice", file=sys.stderr, flush=True)
    for process in processes:
        process.kill()
    end_process(1)
