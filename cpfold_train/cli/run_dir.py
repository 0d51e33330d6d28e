"""Whose a run directory is: one run at a time holds it, and no new run is mixed with an old one."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import psutil

from cpfold_train.config.quoting import typed
from cpfold_train.config.world import is_first_rank, run_dir_of_parent, started_by_slurm, started_by_torchrun
from cpfold_train.errors import ConfigError, DiskFullError
from cpfold_train.whole_file import whole_file

LOCK = "run.lock"
"""In the run directory: who holds it. It stays when the run ends, and says so."""
BEAT = 10.0
"""Seconds after which the holder touches the lock again, for other machines, which cannot see its process."""


@dataclass(frozen=True)
class Holder:
    """Who holds a directory.

    Attributes:
        id: of the run: the same on all ranks that find the directory by themselves, and when the same process, the same
            torchrun or the same SLURM job starts again.
        host: machine of the process.
        pid: of the process that lives as long as the run: this one, or the launcher's.
        created: when that process started, in seconds since 1970: numbers of processes come again.
        started: the same for people.
        ended: whether the run has ended, well or not.
    """

    id: str
    host: str
    pid: int
    created: float
    started: str
    ended: bool = False


def this_run(env: Mapping[str, str] = os.environ) -> Holder:
    """The run that this rank is of."""
    process = psutil.Process(os.getppid() if started_by_torchrun(env) else os.getpid())
    host, created = socket.gethostname(), process.create_time()
    by_slurm = started_by_slurm(env)
    name = f"slurm {env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID')}" if by_slurm else f"{host} {process.pid} {created}"
    return Holder(name, host, process.pid, created, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created)))


@contextmanager
def claimed(run_dir: Path, may_vary: bool, goes_on: bool) -> Iterator[Path]:
    """The directory of this run, which nobody else gets until the block ends.

    Args:
        run_dir: as configured.
        may_vary: it is named by the time, and another run of the same second has another name: ``NAME-2``.
        goes_on: the run resumes from what is in the directory, or was told to where there is something.

    Raises:
        ConfigError: another run holds it, an earlier run has left something there, or it cannot be written.
    """
    if given := run_dir_of_parent():
        yield Path(given)
        return
    if not (may_vary or is_first_rank()):
        yield run_dir
        return
    try:
        run_dir, again = _take(run_dir, may_vary)
    except OSError as error:
        raise ConfigError(
            f"hydra.run.dir={run_dir} cannot be written ({error.strerror}): type another hydra.run.dir"
        ) from error
    if not is_first_rank():
        yield run_dir
        return
    ended = threading.Event()
    threading.Thread(target=_beat, args=(run_dir / LOCK, ended), daemon=True, name="run directory").start()
    try:
        if not (goes_on or again) and _holds_a_run(run_dir):
            raise ConfigError(
                f"hydra.run.dir={run_dir} has an earlier run: type {typed('resume', str(run_dir))} to go on with it, "
                "or another hydra.run.dir to start again"
            )
        yield run_dir
    finally:
        ended.set()
        with suppress(OSError, DiskFullError):
            _write(run_dir / LOCK, replace(this_run(), ended=True))


def remove_metrics(run_dir: Path) -> None:
    """Remove what a start that has left no checkpoint wrote of its steps, before they are made again."""
    for name in ("metrics.csv", "modules.csv", "result.json"):
        (run_dir / name).unlink(missing_ok=True)


def _take(run_dir: Path, may_vary: bool) -> tuple[Path, bool]:
    """The directory that is now this run's, and whether the same process has held it before, which starts again."""
    mine = this_run()
    for number in count(1):
        folder = run_dir.with_name(f"{run_dir.name}-{number}") if number > 1 else run_dir
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / LOCK
        if may_vary and not lock.exists() and _holds_a_run(folder):
            continue
        while not _create(lock, mine):
            other = _read(lock)
            if other is not None and other.id == mine.id:
                if is_first_rank():
                    _write(lock, mine)
                return folder, not started_by_torchrun() and not started_by_slurm()
            if other is None:
                continue
            if may_vary:
                break
            if _lives(other, lock):
                raise ConfigError(
                    f"hydra.run.dir={run_dir} is held by a run on {other.host} (process {other.pid}, started "
                    f"{other.started}): wait for its end, or type another hydra.run.dir"
                )
            _remove(lock, other)
        else:
            return folder, False
    raise AssertionError


def _create(lock: Path, holder: Holder) -> bool:
    try:
        with lock.open("x") as file:
            file.write(json.dumps(asdict(holder)))
    except FileExistsError:
        return False
    return True


def _write(lock: Path, holder: Holder) -> None:
    with whole_file(lock) as file:
        file.write(json.dumps(asdict(holder)))


def _read(lock: Path) -> Holder | None:
    """Who holds a directory; None where the lock is gone. One that stays empty was left by a process that was killed as
    it made it."""
    for _ in range(40):
        try:
            return Holder(**json.loads(lock.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.05)
    return Holder("", socket.gethostname(), 0, 0.0, "", ended=True)


def _remove(lock: Path, stale: Holder) -> None:
    """Remove a stale lock, and no other one that somebody has put there in the meantime."""
    aside = lock.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != stale:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _lives(holder: Holder, lock: Path) -> bool:
    """Whether a run still goes. On another machine one does that touches its lock; clocks are not compared."""
    if holder.ended:
        return False
    if holder.host == socket.gethostname():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(holder.pid)
            return abs(process.create_time() - holder.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return False
    print(f"hydra.run.dir={lock.parent} was held on {holder.host}: looking for {3 * BEAT:.0f} s whether it still is")
    touched, deadline = lock.stat().st_mtime_ns, time.monotonic() + 3 * BEAT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT))
        if not lock.exists() or lock.stat().st_mtime_ns != touched:
            return True
    return False


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(lock)


def _holds_a_run(folder: Path) -> bool:
    """Whether a run has made steps or a validation here: one that was refused as it started has not."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.csv"
    # The first line names the columns.
    rows = metrics.read_text().splitlines()[1:] if metrics.exists() else []
    return bool(rows) or (checkpoints.is_dir() and any(checkpoints.iterdir()))
