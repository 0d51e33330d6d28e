"""What an exchange says when a peer does not answer."""

from __future__ import annotations

import multiprocessing as mp
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cpfold_train.parallel import exchange
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.ledger import Ledger
from cpfold_train.parallel.redistribute import redistribute


def wait_for_a_silent_peer(rank: int, store: str, answer) -> None:
    timeout = timedelta(seconds=2)
    file_store = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=2, timeout=timeout)
    cp = ContextParallel(Grid(1, 2, 1, rank), timeout=timeout)
    if rank == 1:
        time.sleep(60)
    has = (((0, 3),), ((3, 6),))
    try:
        redistribute(torch.zeros(3), cp, cp.all, (0,), has, has[::-1], "an op")
    except RuntimeError as error:
        answer.put(str(error))


def test_timeout_names_op_ranks_and_shapes(tmp_path):
    context = mp.get_context("fork")
    answer = context.Queue()
    ranks = [
        context.Process(target=wait_for_a_silent_peer, args=(rank, str(tmp_path / "store"), answer), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    text = answer.get(timeout=50)
    for process in ranks:
        process.kill()
    assert "an op: the exchange on axis cp failed on rank 0" in text
    assert "sends to rank 1 (3,) and receives from rank 1 (3,)" in text


@pytest.mark.parametrize(
    ("told", "wrapped"), [("Connection closed by peer", True), ("DataLoader worker (pid 7) exited", False)]
)
def test_a_data_worker_that_ends_while_a_rank_waits_is_no_fault_of_the_exchange(monkeypatch, told, wrapped):
    class Work:
        def wait(self) -> None:
            raise RuntimeError(told)

    monkeypatch.setattr(exchange.dist, "P2POp", lambda *_: None)
    monkeypatch.setattr(exchange.dist, "batch_isend_irecv", lambda _: [Work()])
    axis = Axis("cp_row", 2, 0, (0, 1), None)
    posted = exchange.Exchange(axis, "an_op", Ledger(), {1: torch.ones(1)}, {1: torch.ones(1)})
    with pytest.raises(RuntimeError) as error:
        posted.wait()
    assert ("an_op" in str(error.value)) == wrapped
