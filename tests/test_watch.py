"""What a run says and does over NCCL, where nobody's wait ends with an error: with stand-ins for what is not here, and
with real processes over gloo."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.flight_recorder.components.loader import read_dir

from cpfold_train import processes
from cpfold_train.faults import out_of_memory
from cpfold_train.faults.mixin import FaultMixin
from cpfold_train.faults.out_of_memory import OUT_OF_MEMORY, MemorySnapshot, is_out_of_memory
from cpfold_train.faults.reporter import sentence_on
from cpfold_train.parallel import flight_recorder, watch
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.ledger import Ledger
from cpfold_train.parallel.rendezvous import open_rendezvous
from tests.cuda_events import Stream
from tests.test_config import refusal
from tests.test_training_runs import TINY


def rank_of_two(rank: int, port: int, folder: Path, stands_in, told) -> None:
    """A rank whose watch has the patience that it has over NCCL, one second, and looks often."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    cp = ContextParallel(Grid(1, 2, 1, rank), timeout=timedelta(seconds=1))
    watch.INTERVAL, watch.SILENT = 0.2, 5.0
    original = watch.dist.get_backend
    watch.dist.get_backend = lambda: "nccl"
    guard = watch.Watch(cp, lambda fault: told.put((rank, fault)), folder)
    watch.dist.get_backend = original
    with cp.ledger.standing("an_op"):
        cp.ledger.posted += 1
    cp.ledger.completed += 1
    stands_in(cp, rank)
    time.sleep(60)
    guard.stop()


def a_wait_on_the_device(cp, rank: int) -> None:
    """The device of rank 0 stands in a wait that the host has left behind; rank 1 does not come to it."""
    if rank == 0:
        stream = Stream(pytest.MonkeyPatch())
        with cp.ledger.waiting("another_op", torch.device("cuda")):
            pass
        stream.run_to(1)


def a_collective_that_the_ledger_does_not_know(cp, rank: int) -> None:
    """As one of DDP's."""
    if rank == 0:
        dist.all_reduce(torch.ones(2))


@pytest.mark.parametrize("stands_in", [a_wait_on_the_device, a_collective_that_the_ledger_does_not_know])
def test_a_rank_that_waits_on_its_device_for_too_long(tmp_path, stands_in):
    store, told = open_rendezvous(), mp.get_context("fork").Queue()
    folder = tmp_path / "faults"
    arguments = [(rank, store.port, folder, stands_in, told) for rank in range(2)]
    ranks = [mp.get_context("fork").Process(target=rank_of_two, args=a, daemon=True) for a in arguments]
    for process in ranks:
        process.start()
    rank, fault = told.get(timeout=50)
    for process in ranks:
        process.kill()
    assert rank == 0
    if stands_in is a_wait_on_the_device:
        assert re.match("rank 0 .*another_op; rank 1 .*an_op ", fault)
    else:
        assert re.match("rank 0 .*all_reduce .*; rank 1 .*an_op.*; rank 0 .*all_reduce .*rank 1", fault)
    files = {file.name for file in folder.iterdir()}
    assert files == {"nccl_trace_rank_0", "nccl_trace_rank_1"}
    dumps, _ = read_dir(SimpleNamespace(prefix=flight_recorder.PREFIX, trace_dir=str(folder)))
    assert {dump["rank"] for dump in dumps.values()} == {0, 1}, "torch's own analyser reads them"


def sign(rank: int, waiting: bool, there_s: float, completed: int) -> watch.Sign:
    return watch.Sign(rank, 0.5, "an_op", waiting, there_s, completed, completed + waiting)


@pytest.mark.parametrize(
    ("signs", "rank"),
    [
        ([sign(1, True, 9.0, 7), sign(2, False, 20.0, 7), sign(3, False, 1.0, 9)], 2),
        ([sign(1, True, 9.0, 7), sign(2, True, 20.0, 5), sign(3, True, 1.0, 6)], 3),
    ],
)
def test_who_holds_up_the_others(monkeypatch, signs, rank):
    """One at work; where all wait, one of the same replica, here ranks 0, 1 and 3, that has come less far."""
    monkeypatch.setattr(watch.dist, "get_backend", lambda: "nccl")
    all_ranks = Axis("cp", 3, 0, (0, 1, 3), None)
    cp = SimpleNamespace(
        grid=Grid(), ledger=Ledger(), all=all_ranks, timeout=timedelta(1), mesh=SimpleNamespace(device_type="cpu")
    )
    assert watch.Watch(cp, pytest.fail, None)._who_holds_up(signs).rank == rank


def entry(name: str, state: str, group: tuple[str, str] = ("0", "default_pg")) -> dict:
    """As NCCL's recorder writes it."""
    retired = state == "completed"
    return {"profiling_name": f"nccl:{name}", "state": state, "retired": retired, "process_group": group,
            "time_created_ns": 5_000_000_000}  # fmt: skip


GROUPS = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"},
          "7": {"name": "7", "desc": "cp_col", "ranks": "[2, 3]"}}  # fmt: skip


def recorded(*entries: dict) -> dict:
    return {"version": "2.10", "pg_config": GROUPS, "pg_status": {}, "entries": list(entries)}


DONE = [entry("all_reduce", "completed"), entry("send 0->1", "scheduled"), entry("recv 0<-1", "scheduled"),
        entry("coalesced", "completed")]  # fmt: skip
"""The single messages of a group that is over stay as they were when they were posted."""
COL = ("7", "cp_col")


@pytest.mark.parametrize(
    ("dumps", "sentence"),
    [
        ({0: recorded(*DONE), 1: recorded()}, None),
        (
            {0: recorded(*DONE, entry("all_reduce", "started")), 1: recorded(*DONE),
             2: recorded(entry("all_reduce", "scheduled")), 3: recorded(entry("all_reduce", "started"))},
            "ranks 0, 2, 3 are in all_reduce of all ranks, which rank 1 has not joined",
        ),
        (
            {2: recorded(entry("all_reduce", "started", COL)), 3: recorded(entry("all_reduce", "completed", COL))},
            "rank 2 is in all_reduce of cp_col, which rank 3 has not joined",
        ),
        (
            {0: recorded(*DONE, entry("recv 0<-1", "scheduled"), entry("send 0->2", "scheduled"),
                         entry("coalesced", "started"), entry("all_reduce", "scheduled")),
             2: recorded(entry("recv 2<-0", "scheduled"), entry("coalesced", "started"))},
            "rank 0 exchanges messages with ranks 1, 2, which rank 1 has not joined (rank 1 left no trace); "
            "rank 2 exchanges messages with rank 0",
        ),
        (
            # Ranks of a group are counted within it.
            {2: recorded(entry("send 0->1", "scheduled", COL), entry("coalesced", "started", COL)),
             3: recorded(entry("broadcast", "scheduled"))},
            "rank 2 exchanges messages with rank 3, which rank 3 has not joined; rank 3 is in broadcast of all ranks, "
            "which ranks 0, 1, 2 have not joined (ranks 0, 1 left no trace)",
        ),
    ],
)  # fmt: skip
def test_what_follows_from_the_dumps_of_all_ranks(dumps, sentence):
    assert flight_recorder.summary(dumps, 4) == sentence


def test_since_when_a_rank_stands():
    place = flight_recorder.standing(recorded(*DONE, entry("barrier", "scheduled")), 0, 4)
    assert place == ("barrier", "all ranks", frozenset(range(4)), 5.0)


def test_nccl_is_told_where_its_own_dumps_go(tmp_path, monkeypatch):
    environment = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}
    monkeypatch.setattr(os, "environ", environment)
    flight_recorder.keep_dumps_in(tmp_path / "faults")
    assert environment == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "50",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/faults/nccl_trace_rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert (tmp_path / "faults").is_dir(), "NCCL makes none"


def test_over_nccl_the_process_group_is_more_patient_than_the_watch(ranks, monkeypatch):
    assert ranks.run(patience_of_groups, 2, 3) == [{"world": 70.0, "cp_row": 70.0, "cp_col": 70.0}] * 6


def patience_of_groups(cp):
    """What a grid sets with a timeout of 10 s over what it takes for NCCL."""
    from cpfold_train.parallel import context

    set_to, c10d = {}, dist.distributed_c10d
    originals = dist.get_backend, c10d._set_pg_timeout, dist.new_subgroups_by_enumeration
    dist.get_backend = lambda: "nccl"
    c10d._set_pg_timeout = lambda timeout, group: set_to.update(world=timeout.total_seconds())

    def subgroups(lines, timeout, group_desc):
        set_to[group_desc] = timeout.total_seconds()
        return None, []

    dist.new_subgroups_by_enumeration = subgroups
    try:
        context.ContextParallel(cp.grid, timeout=timedelta(seconds=10))
    finally:
        dist.get_backend, c10d._set_pg_timeout, dist.new_subgroups_by_enumeration = originals
    return set_to


@pytest.fixture
def over_nccl(monkeypatch):
    """As if the process group were NCCL's; what it is to do when it is given up."""
    monkeypatch.setattr(watch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watch.dist, "get_backend", lambda: "nccl")

    def given_up(does) -> None:
        monkeypatch.setattr(watch.dist.distributed_c10d, "_abort_process_group", does)

    return given_up


class Strategy:
    """What comes after :class:`FaultMixin` in a strategy."""

    root_device = torch.device("cpu")
    global_rank = 1

    def __init__(self, log: list) -> None:
        self.log = log
        self.launcher = SimpleNamespace(end_ranks=lambda patience=10.0: log.append(f"ranks ended in {patience} s"))
        self.watch = SimpleNamespace(
            stop=lambda: log.append("watch stopped"),
            explain=lambda error: "rank 0 failed",
            report=lambda fault: log.append(fault),
        )

    def on_exception(self, exception: BaseException) -> None:
        pass


class WatchedStrategy(FaultMixin, Strategy):
    watch = None


def test_a_rank_that_fails_gives_up_its_exchanges_before_anything_waits_for_them(over_nccl):
    log = []
    over_nccl(lambda: log.append("given up"))
    WatchedStrategy(log).on_exception(RuntimeError("a fault"))
    assert log == ["watch stopped", "given up", "ranks ended in 10.0 s"]
    log.clear()
    WatchedStrategy(log).on_exception(SystemExit(143))
    assert log == ["watch stopped", "ranks ended in 10.0 s"], "nothing has failed where a run was asked to end"


def test_a_rank_that_cannot_give_up_its_exchanges_leaves_them_as_they_are(over_nccl, monkeypatch, capfd):
    log = []
    over_nccl(lambda: time.sleep(60))
    monkeypatch.setattr("cpfold_train.faults.mixin.GRACE", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: log.append(f"exit {code}"))
    # The folder that would go is that of these tests.
    monkeypatch.setattr(processes.shutil, "rmtree", lambda *_, **__: None)
    WatchedStrategy(log).on_exception(RuntimeError("a fault"))
    assert log[:3] == ["watch stopped", "ranks ended in 0.0 s", "exit 1"]
    told = capfd.readouterr().err
    assert (
        "error: rank 1 was ended because RuntimeError: a fault" in told and "Traceback" in told
    ) or "a fault" in told


def test_over_gloo_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(watch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watch.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(
        watch.dist.distributed_c10d, "_abort_process_group", lambda: pytest.fail("gloo has no use for it")
    )
    assert watch.abort_exchanges(1.0)


CUDA = "\nCUDA kernel errors might be asynchronously reported at some other API call"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.28.9\n"
)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 1125899906842624 bytes. Error code 12 (Cannot allocate memory)"), True),
        (RuntimeError(f"CUDA error: out of memory{CUDA}"), True),
        (torch.AcceleratorError(f"CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'{CUDA}"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (dist.DistBackendError(f"{NCCL}ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                               "Cuda failure 2 'out of memory'"), True),
        (dist.DistBackendError(f"{NCCL}ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                               "Failed to CUDA calloc 536870912 bytes"), True),
        (dist.DistBackendError(f"{NCCL}Last error:\nCuda failure 'out of memory'"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (dist.DistBackendError(f"{NCCL}Last error:\nCuda failure 1 'invalid argument'"), False),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory_is_known_by_whatever_name_it_comes(error, is_one):
    assert is_out_of_memory(error) == is_one
    around = RuntimeError("an_op: the exchange on axis cp failed on rank 0")
    around.__cause__ = error
    assert is_out_of_memory(around) == is_one
    assert (sentence_on(error, Path("run")) == OUT_OF_MEMORY) == is_one


def test_nobody_else_is_to_blame_for_memory_that_nccl_does_not_find():
    log = []
    strategy = WatchedStrategy(log)
    strategy.note(dist.DistBackendError(f"{NCCL}Last error:\nCuda failure 2 'out of memory'"))
    assert strategy.fault is None and log == [f"rank 1 failed: {OUT_OF_MEMORY}"]
    strategy.note(dist.DistBackendError("NCCL error: remote process exited"))
    assert strategy.fault == "rank 0 failed"


def test_a_memory_snapshot_is_written_and_told_of(tmp_path, monkeypatch):
    log = []
    memory = SimpleNamespace(
        _record_memory_history=lambda max_entries, stacks: log.append((max_entries, stacks)),
        _dump_snapshot=lambda path: Path(path).touch(),
    )
    monkeypatch.setattr(out_of_memory.torch.cuda, "memory", memory)
    snapshot, trainer = MemorySnapshot(tmp_path / "faults"), SimpleNamespace(global_rank=3)
    snapshot.setup(trainer, None, "fit")
    assert log == [(100_000, "python")]
    snapshot.on_exception(trainer, None, ArithmeticError("something else"))
    assert not (tmp_path / "faults").exists()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    snapshot.on_exception(trainer, None, error)
    path = tmp_path / "faults" / "memory_rank_3.pickle"
    assert path.exists()
    told = f"{OUT_OF_MEMORY}; {path} has what was allocated: open it at https://docs.pytorch.org/memory_viz"
    assert sentence_on(error, tmp_path) == told
    log.clear()
    strategy = WatchedStrategy(log)
    strategy.note(error)
    assert log == [f"rank 1 failed: {told}"]


def test_a_memory_snapshot_needs_a_gpu(monkeypatch, capsys):
    told = refusal(monkeypatch, capsys, *TINY, "trainer.accelerator=cpu", "faults.memory_snapshot=true")
    assert "faults.memory_snapshot=false" in told
