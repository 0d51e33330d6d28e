"""What ranks know of each other beside the messages of the model: who failed and why, and who does not answer.

A rank that waits for another learns from its connection only that something is wrong. The store through which the ranks
found each other still works then, so it says the rest. Nothing here is on the path of a step: a thread writes a line
every other second.

Over gloo a wait for a rank that does not come ends with an error, after which the rank that waited asks who it was.
Over NCCL it does not: it is the device that waits, and after its own timeout NCCL ends the process. So there the watch
looks how long the device has stood where it is, and ends the process itself, before NCCL does
(:data:`~cpfold_train.parallel.context.NCCL_MARGIN`), with a sentence.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from cpfold_train.parallel import flight_recorder
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.ledger import LedgerPosition

INTERVAL = 2.0
"""Seconds between two signs of life of a rank."""
SILENT = 3 * INTERVAL
"""Seconds without one after which a rank counts as stopped or gone."""
GRACE = 15.0
"""Seconds that a rank has to end by itself once another has failed."""

_OF_A_PEER = re.compile(r"gloo/|NCCL|nccl|Connection (closed|reset|refused)|the exchange on axis")
_FAULT = "watch/fault"
_DUMPS = "watch/dumps"
"""Set once somebody wants to know where all ranks are."""
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
    completed: int
    """Waits that are over (:class:`~cpfold_train.parallel.ledger.Ledger`)."""
    posted: int
    """Waits that the host has come to."""


class Watch:
    """This rank's part of the watch over all ranks of the world.

    Args:
        cp: the running grid.
        on_fault: called in the watch's own thread with a sentence, when another rank has failed and this one has not
            ended by itself within ``GRACE`` seconds, and at once when it has waited on its device for ``cp.timeout``.
            It is to end the process.
        dumps: where each rank writes what torch remembers of its exchanges, once one of them takes too long; every rank
            must see it. None where they are to write nothing.
    """

    def __init__(self, cp: ContextParallel, on_fault: Callable[[str], None], dumps: Path | None) -> None:
        self._rank, self._size, self._ledger = cp.grid.rank, cp.grid.world_size, cp.ledger
        self._replica = cp.all.ranks
        self._on_fault, self._dumps = on_fault, dumps
        self._device = torch.cuda.current_device() if cp.mesh.device_type == "cuda" else None
        # gloo's waits end by themselves.
        self._patience_s = cp.timeout.total_seconds() if dist.get_backend() == "nccl" else math.inf
        self._dumping, self._has_dumped = threading.Lock(), False
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
        position, found = self._ledger.position, time.monotonic()
        while time.monotonic() < found + (SILENT if not _is_timeout(error) else 0.5):
            if sentence := self.reported():
                return sentence
            time.sleep(0.2)
        return self._blame(position, found, ask_all=_is_timeout(error))

    def _blame(self, position: LedgerPosition, found: float, ask_all: bool) -> str:
        me = f"rank {self._rank} waited {found - position.since:.0f} s in {position.op}"
        signs = _within(5.0, self._signs, None)
        if signs is None:
            return f"{me}, and rank 0, which keeps what ranks tell each other, does not answer"
        silent = [sign for sign in signs if sign.silent_s > SILENT]
        if silent:
            last = ", ".join(f"rank {s.rank} for {s.silent_s:.0f} s, last seen {_where(s)}" for s in silent)
            sentence = f"{me} for a rank that has stopped or is gone: there is no sign of {last}"
        else:
            last = self._who_holds_up(signs)
            sentence = f"{me}; rank {last.rank} holds it up: it is {_where(last)} for {last.there_s:.0f} s"
            if last.waiting or last.posted > last.completed:
                here = f"{self._ledger.completed} of {self._ledger.posted}"
                sentence += f", having completed {last.completed} of {last.posted} exchanges, rank {self._rank} {here}"
        if ask_all and self._dumps is not None:
            answering = {self._rank, *(sign.rank for sign in signs if sign not in silent)}
            if told := _within(3 * INTERVAL, lambda: self._all_dumps(answering), None):
                sentence += f"; {told}"
        return sentence

    def _who_holds_up(self, signs: list[Sign]) -> Sign:
        """One that has been at work for longer than the others have waited. Where all wait, one that is behind: ranks
        of a replica come to the same exchanges."""
        if at_work := [sign for sign in signs if not sign.waiting]:
            return max(at_work, key=lambda sign: sign.there_s)
        return min(signs, key=lambda sign: (sign.rank not in self._replica, sign.completed))

    def _all_dumps(self, answering: set[int]) -> str | None:
        """Have these ranks write what torch remembers of their exchanges, and say what follows from it."""
        self._store.set(_DUMPS, "")
        self._dump_if_asked()
        there: set[int] = set()
        deadline = time.monotonic() + 2 * INTERVAL
        while there < answering and time.monotonic() < deadline:
            there |= {rank for rank in answering - there if self._store.check([_dump_key(rank)])}
            time.sleep(0.1)
        return flight_recorder.summary(
            {rank: flight_recorder.read_dump(self._dumps, rank) for rank in there}, self._size
        )

    def _dump_if_asked(self) -> None:
        with self._dumping:
            if not self._has_dumped and self._store.check([_DUMPS]):
                self._has_dumped = True
                flight_recorder.write_dump(self._dumps, self._rank)
                self._store.set(_dump_key(self._rank), "")

    def _overdue(self, position: LedgerPosition) -> str | None:
        """A sentence where the device has stood for too long; None where it has not, and over gloo."""
        now = time.monotonic()
        if now - position.since < self._patience_s:
            return None
        if not position.waiting:
            # At work for all the ledger knows; but of DDP's and FSDP's exchanges only torch does.
            other = flight_recorder.standing_here(self._rank, self._size)
            if other is None or time.time() - other.since < self._patience_s:
                return None
            position = LedgerPosition(f"{other.op} of {other.group}", True, now - (time.time() - other.since))
        return self._blame(position, now, ask_all=True)

    def _signs(self) -> list[Sign]:
        """Of all other ranks."""
        signs = []
        for rank in range(self._size):
            if rank == self._rank:
                continue
            if not self._store.check([_key(rank)]):
                signs.append(Sign(rank, math.inf, "the start", False, 0.0, 0, 0))
                continue
            at, op, waiting, there_s, *counts = json.loads(self._store.get(_key(rank)))
            silent_s = max(0.0, time.time() - at)
            signs.append(Sign(rank, silent_s, op, waiting, there_s + silent_s, *counts))
        return signs

    def _run(self) -> None:
        if self._device is not None:
            # A thread begins on GPU 0, where asking for an event could make it a context of hundreds of MiB.
            torch.cuda.set_device(self._device)
        fault, wait_s = None, GRACE
        while not self._stopped.is_set():
            with suppress(RuntimeError):
                # What is wrong with the device, the next computation on it tells too.
                self._ledger.poll()
            position = self._ledger.position
            sign = [position.op, position.waiting, time.monotonic() - position.since]
            try:
                self._store.set(
                    _key(self._rank), json.dumps([time.time(), *sign, self._ledger.completed, self._ledger.posted])
                )
            except RuntimeError:
                fault = "rank 0 has ended, and with it what ranks tell each other"
                break
            if self._dumps is not None:
                _within(2 * INTERVAL, self._dump_if_asked, None)
            if fault := self.reported():
                break
            if fault := self._overdue(position):
                self.report(fault)
                # What waits for the device does not come back by itself.
                wait_s = 0.0
                break
            self._stopped.wait(INTERVAL)
        if fault and not self._stopped.wait(wait_s):
            self._on_fault(fault)


def abort_exchanges(seconds: float) -> bool:
    """Give up all that this rank has in flight over NCCL, and the process groups with it. Kernels that wait for another
    rank end, and with them whatever waits for the device. Over other backends nothing is in flight on a device, and
    nothing is done.

    Returns:
        Whether it was done within so many seconds: NCCL may hang in it.
    """
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return True
    return _within(seconds, lambda: (dist.distributed_c10d._abort_process_group(), True)[1], False)


def _key(rank: int) -> str:
    return f"watch/sign/{rank}"


def _dump_key(rank: int) -> str:
    return f"watch/dump/{rank}"


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
    """The store's answer, or ``otherwise`` where it gives none: a store whose process is stopped never does. Nor is
    there one where what ranks write for each other has failed."""
    answers: list[T] = []

    def run() -> None:
        with suppress(RuntimeError, OSError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
