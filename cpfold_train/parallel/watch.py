"""What ranks know of each other beside the messages of the model: who failed and why, and who does not answer.

A rank that waits for another learns from its connection only that something is wrong. The store through which the ranks
found each other still works then, so it says the rest. Nothing here is on the path of a step: a thread writes a line
every other second.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.ledger import Place

INTERVAL = 2.0
"""Seconds between two signs of life of a rank."""
SILENT = 3 * INTERVAL
"""Seconds without one after which a rank counts as stopped or gone."""
GRACE = 15.0
"""Seconds that a rank has to end by itself once another has failed."""

_OF_A_PEER = re.compile(r"gloo/|NCCL|nccl|Connection (closed|reset|refused)|the exchange on axis")
_FAULT = "watch/fault"
T = TypeVar("T")


class Sign(NamedTuple):
    """A rank's last sign of life."""

    rank: int
    silent_s: float
    """How long ago it was given."""
    op: str
    waiting: bool
    there_s: float
    """How long the rank has been there by now."""


class Watch:
    """This rank's part of the watch over all ranks of the world.

    Args:
        cp: the running grid.
        on_fault: called in the watch's own thread with a sentence, when another rank has failed and this one has not
            ended by itself within ``GRACE`` seconds. It is to end the process.
    """

    def __init__(self, cp: ContextParallel, on_fault: Callable[[str], None]) -> None:
        self._rank, self._size, self._ledger = cp.grid.rank, cp.grid.world_size, cp.ledger
        self._on_fault = on_fault
        # A connection of its own: one that waits would keep the others.
        self._store = dist.distributed_c10d._get_default_store().clone() if self._size > 1 else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        if self._store is not None:
            self._thread.start()

    def stop(self) -> None:
        """No more signs from here, and nothing ends this process any more."""
        self._stopped.set()
        if self._store is not None and threading.current_thread() is not self._thread:
            # A thread that is in the store's code when the interpreter ends would keep the process.
            self._thread.join(INTERVAL)

    def report(self, fault: str) -> None:
        """Tell the others in a sentence why this rank cannot go on. The first report of the run counts."""
        if self._store is not None:
            _within(2.0, lambda: self._store.compare_set(_FAULT, "", json.dumps([self._rank, fault])), None)

    def reported(self) -> str | None:
        """A sentence on the failure of another rank, None where there is none to the knowledge of the store."""
        if self._store is None or not _within(2.0, lambda: self._store.check([_FAULT]), False):
            return None
        rank, fault = json.loads(_within(2.0, lambda: self._store.get(_FAULT), b'[-1, ""]'))
        return None if rank in (self._rank, -1) else fault

    def explain(self, error: BaseException) -> str | None:
        """A sentence on why this rank could not go on, where the cause is another rank; None where it is its own.

        Takes some seconds where nobody has reported: a rank that was killed is known by its silence.
        """
        if self._store is None or not _is_of_a_peer(error):
            return None
        place, found = self._ledger.place, time.monotonic()
        while time.monotonic() < found + (SILENT if not _is_timeout(error) else 0.5):
            if sentence := self.reported():
                return sentence
            time.sleep(0.2)
        return self._blame(place, found)

    def _blame(self, place: Place, found: float) -> str:
        me = f"rank {self._rank} waited {found - place.since:.0f} s in {place.op}"
        signs = _within(5.0, self._signs, None)
        if signs is None:
            return f"{me}, and rank 0, which keeps what ranks tell each other, does not answer"
        if silent := [sign for sign in signs if sign.silent_s > SILENT]:
            last = ", ".join(f"rank {s.rank} for {s.silent_s:.0f} s, last seen {_where(s)}" for s in silent)
            return f"{me} for a rank that has stopped or is gone: there is no sign of {last}"
        # Whoever holds up the others has been at work for longer than they have waited.
        last = max(signs, key=lambda sign: (not sign.waiting, sign.there_s))
        return f"{me}; rank {last.rank} holds it up: it is {_where(last)} for {last.there_s:.0f} s"

    def _signs(self) -> list[Sign]:
        """Of all other ranks."""
        signs = []
        for rank in range(self._size):
            if rank == self._rank:
                continue
            if not self._store.check([_key(rank)]):
                signs.append(Sign(rank, float("inf"), "the start", False, 0.0))
                continue
            op, waiting, there_s, at = json.loads(self._store.get(_key(rank)))
            silent_s = max(0.0, time.time() - at)
            signs.append(Sign(rank, silent_s, op, waiting, there_s + silent_s))
        return signs

    def _run(self) -> None:
        fault = None
        while not self._stopped.is_set():
            try:
                place = self._ledger.place
                sign = [place.op, place.waiting, time.monotonic() - place.since, time.time()]
                self._store.set(_key(self._rank), json.dumps(sign))
                fault = self.reported()
            except RuntimeError:
                fault = "rank 0 has ended, and with it what ranks tell each other"
            if fault:
                break
            self._stopped.wait(INTERVAL)
        if fault and not self._stopped.wait(GRACE):
            self._on_fault(fault)


def _key(rank: int) -> str:
    return f"watch/sign/{rank}"


def _where(sign: Sign) -> str:
    return f"in {sign.op}" if sign.waiting else f"after {sign.op}"


def _is_of_a_peer(error: BaseException | None) -> bool:
    return any(isinstance(e, RuntimeError) and _OF_A_PEER.search(str(e)) for e in _chain(error))


def _is_timeout(error: BaseException | None) -> bool:
    return any(re.search("[Tt]imed out|timeout", str(e)) for e in _chain(error))


def _chain(error: BaseException | None) -> list[BaseException]:
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def _within(seconds: float, ask: Callable[[], T], otherwise: T) -> T:
    """The store's answer, or ``otherwise`` where it gives none: a store whose process is stopped never does."""
    answers: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
