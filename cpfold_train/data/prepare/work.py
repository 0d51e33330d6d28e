"""Convert entries in parallel, so that a run that was interrupted goes on where it stopped.

What is finished lies in a hidden folder until the shards are written: ``KEY.json`` says what became of an entry and
which input it came from, and the sample's members lie beside it. The json file is written last and by renaming, so an
entry is finished if it is there. ``KEY.started`` marks the entries that a process is at.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.connection import wait as wait_for_connection
from pathlib import Path

from cpfold_train.data.prepare.convert import Conversion, Job, Options, convert
from cpfold_train.data.stream.shards import MEMBERS
from cpfold_train.data.structures.structure import FORMAT_VERSION
from cpfold_train.errors import DataError
from cpfold_train.whole_file import whole_file

_AHEAD = 4
"""Jobs that wait in the pool, by worker."""


def convert_all(jobs: list[Job], options: Options, folder: Path, workers: int) -> Iterator[Conversion]:
    """Convert the entries that are not finished yet, and yield all results in the order in which they come.

    Raises:
        DataError: a worker process died.
    """
    for mark in folder.glob("*.started"):
        mark.unlink()
    unfinished = []
    for job in jobs:
        result = _finished(job, options, folder)
        if result is None:
            unfinished.append(job)
        else:
            yield result
    work = partial(_convert_one, options=options, folder=folder)
    if workers == 1:
        yield from map(work, unfinished)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        left = iter(unfinished)
        running = {pool.submit(work, job) for job in islice(left, _AHEAD * workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, job) for job in islice(left, len(done))}
                for future in done:
                    yield future.result()
        except GeneratorExit:
            pool.shutdown(cancel_futures=True)
            raise
        except BrokenProcessPool as error:
            at = sorted(mark.stem for mark in folder.glob("*.started"))
            raise DataError(
                f"a worker process died (out of memory?) while these were converted: {', '.join(at)}; run the same "
                "command again to go on from here, with fewer --workers, or leave one out with --skip ID"
            ) from error


def start_worker() -> None:
    """What a worker process begins with: Ctrl-C, which reaches it too, is left to the process that started it, whose
    end, whatever the cause, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for_connection([parent_process().sentinel])
    os._exit(1)


def read_members(folder: Path, key: str) -> dict[str, bytes]:
    """The members of a finished sample, by extension."""
    return {name: path.read_bytes() for name, path in _members(folder, key).items() if path.exists()}


def members_size(folder: Path, key: str) -> int:
    """Bytes that they take together."""
    return sum(path.stat().st_size for path in _members(folder, key).values() if path.exists())


def _members(folder: Path, key: str) -> dict[str, Path]:
    return {name: folder / f"{key}.member.{name}" for name in MEMBERS}


def _convert_one(job: Job, options: Options, folder: Path) -> Conversion:
    started = folder / f"{job.source.key}.started"
    started.touch()
    result, members = convert(job, options)
    for name, path in _members(folder, result.key).items():
        path.unlink(missing_ok=True)
        if name in members:
            path.write_bytes(members[name])
    # Last, for it says that the members are complete.
    with whole_file(folder / f"{result.key}.json") as file:
        json.dump({"fingerprint": _fingerprint(job, options), "result": asdict(result)}, file)
    started.unlink()
    return result


def _finished(job: Job, options: Options, folder: Path) -> Conversion | None:
    path = folder / f"{job.source.key}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return Conversion(**stored["result"]) if stored["fingerprint"] == _fingerprint(job, options) else None


def _fingerprint(job: Job, options: Options) -> str:
    """Of the options and of the input files as the file system describes them."""
    files = [job.source.path, *(path for path, _ in job.alignments + job.templates)]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((FORMAT_VERSION, job, options, states)).encode()).hexdigest()
