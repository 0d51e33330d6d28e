"""Several ranks: every op and block on a grid of the device against 1x1 on the CPU, in fp64.

Where there are several GPUs, each rank has its own. On a machine with one, four ranks share it: NCCL refuses two ranks
on a GPU of one host, but takes them for ranks of several hosts when each has an ``NCCL_HOSTID`` of its own, and sends
over sockets of the loopback device. NVIDIA does not promise that this works. Where it does not, messages go through the
memory of the host over gloo, which proves everything but NCCL.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from cpfold_train.gpu_check.exactness import tell
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.parallel import exchange_plan
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.grid import Grid, squarest
from cpfold_train.parallel.ledger import Ledger
from cpfold_train.parallel.rendezvous import join_rendezvous
from cpfold_train.processes import end_process
from cpfold_train.testing.cases import CASES
from cpfold_train.testing.parity import run

MOST = 4
OVER_LOOPBACK = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}


@dataclass(frozen=True)
class Way:
    """How ranks get at devices and at each other.

    Attributes:
        name: for the record.
        grid: of ranks.
        device: type.
        shared: whether all ranks have the first GPU.
        backend_of: type of the device whose backend carries the messages.
        environment: of rank k.
        share: of the time that is left, to spend on it at most.
    """

    name: str
    grid: Grid
    device: str
    shared: bool
    backend_of: str
    environment: Callable[[int], dict[str, str]]
    share: float


def compare_ranks(record: Record, scope: Scope, gpus: int) -> None:
    """Every case on several ranks, in the first of the ways that works here.

    Args:
        gpus: of this machine.
    """
    for way in _ways(scope, gpus):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            fault = _start(way, scope.cases, Path(folder), way.share * record.time_left)
            record.add(way.name, grid=str(way.grid), seconds=time.monotonic() - started, fault=fault)
            if fault is None:
                _compare(record, way, scope.cases, Path(folder))
                return
    record.fail("ranks", f"no way works, {way.name} for this reason: {fault}")


def _ways(scope: Scope, gpus: int) -> list[Way]:
    if scope.device == "cpu":
        return [Way("gloo", Grid(1, 2), "cpu", False, "cpu", lambda rank: {}, 1.0)]
    if gpus > 1:
        own = Grid(*squarest(min(gpus, MOST)))
        return [Way("NCCL, a GPU each", own, "cuda", False, "cuda", lambda rank: {}, 1.0)]
    grid = Grid(2, 2)
    return [
        Way("NCCL on one GPU, over loopback", grid, "cuda", True, "cuda", _host_of, 0.5),
        Way("gloo on one GPU, through the host", grid, "cuda", True, "cpu", lambda rank: {}, 1.0),
    ]


def _host_of(rank: int) -> dict[str, str]:
    return OVER_LOOPBACK | {"NCCL_HOSTID": f"rank{rank}"}


def _start(way: Way, names: tuple[str, ...], folder: Path, limit_s: float) -> str | None:
    """Run the cases on all ranks; None, or why that failed."""
    context = mp.get_context("fork")
    # CUDA has not been touched in this process, or its children could not use it.
    ranks = [
        context.Process(target=_rank, args=(way, rank, names, folder, limit_s)) for rank in range(way.grid.world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks):
            # The others get a moment to say why they have failed as well.
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        process.join()
    faults = [(folder / f"fault{rank}").read_text() for rank in range(len(ranks)) if (folder / f"fault{rank}").exists()]
    if faults:
        return faults[0]
    codes = [process.exitcode for process in ranks]
    return f"not done after {limit_s:.0f} s, exit codes {codes}" if any(codes) else None


def _rank(way: Way, rank: int, names: tuple[str, ...], folder: Path, limit_s: float) -> None:
    os.environ.update(way.environment(rank))
    torch.set_num_threads(1)
    try:
        device = torch.device(way.device, 0 if way.shared else rank) if way.device == "cuda" else torch.device("cpu")
        if way.device == "cuda":
            torch.cuda.set_device(device)
        if way.device != way.backend_of:
            exchange_plan.Exchange = ThroughHost
        join_rendezvous(folder, rank, way.grid.world_size, device if way.backend_of == "cuda" else torch.device("cpu"))
        grid = Grid(way.grid.rows, way.grid.cols, 1, rank)
        cp = ContextParallel(grid, way.device, timedelta(seconds=max(1.0, limit_s)))
        for name in names:
            torch.save(run(cp, CASES[name]), folder / f"{names.index(name)}-{rank}.pt")
    except BaseException as error:
        traceback.print_exc()
        (folder / f"fault{rank}").write_text(f"rank {rank}: {type(error).__name__}: {error}"[:500])
    finally:
        # Not through destructors, which may wait for ranks that are gone.
        end_process(int((folder / f"fault{rank}").exists()))


def _compare(record: Record, way: Way, names: tuple[str, ...], folder: Path) -> None:
    cpu = ContextParallel(Grid(), "cpu")
    for i, name in enumerate(names):
        parts = [torch.load(folder / f"{i}-{rank}.pt", weights_only=True) for rank in range(way.grid.world_size)]
        record.attempt(name, tell, record, name, CASES[name], run(cpu, CASES[name]), parts, way.grid)


class ThroughHost(Exchange):
    """An exchange of CUDA tensors by a backend that takes only those of the CPU."""

    def __init__(
        self, axis: Axis, op: str, ledger: Ledger, sends: dict[int, Tensor], receives: dict[int, Tensor]
    ) -> None:
        self._targets = receives
        staged = {peer: torch.empty(x.shape, dtype=x.dtype) for peer, x in receives.items()}
        super().__init__(axis, op, ledger, {peer: x.cpu() for peer, x in sends.items()}, staged)

    def wait(self) -> dict[int, Tensor]:
        """The buffers on the device, filled."""
        for peer, x in super().wait().items():
            self._targets[peer].copy_(x)
        received, self._targets = self._targets, {}
        return received
