"""Exchanges: what one says when a peer does not answer, whose messages meet, and what lives until it is over."""

from __future__ import annotations

import multiprocessing as mp
import re
import time
import weakref
from datetime import timedelta
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cpfold_train.config.compose import compose
from cpfold_train.parallel import exchange
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.exchange import Exchange
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.ledger import Ledger
from cpfold_train.parallel.redistribute import finish, redistribute, start
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.training.module import CoFoldingModule
from tests.cuda_events import Stream
from tests.test_training_runs import SMALL


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
    assert re.search("an op.* cp .*rank 0", text)
    assert re.search(r"rank 1 \(3,\).*rank 1 \(3,\)", text)


@pytest.fixture
def works(monkeypatch):
    """Exchanges of this process alone: their works, whose ``wait`` does what the last one appended is told to."""
    posted = []
    monkeypatch.setattr(exchange.dist, "P2POp", lambda op, tensor, peer: (op, tensor, peer))

    def post(messages: list) -> list:
        if not messages:
            raise ValueError("torch takes no empty list")
        posted.append(Work())
        return posted[-1:]

    monkeypatch.setattr(exchange.dist, "batch_isend_irecv", post)
    return posted


class Work:
    """As NCCL's: a wait ends at once."""

    error: str | None = None

    def wait(self) -> None:
        if self.error:
            raise RuntimeError(self.error)


AXIS = Axis("cp_row", 2, 0, (0, 1), None)


@pytest.mark.parametrize(
    ("told", "wrapped"), [("Connection closed by peer", True), ("DataLoader worker (pid 7) exited", False)]
)
def test_a_data_worker_that_ends_while_a_rank_waits_is_no_fault_of_the_exchange(works, told, wrapped):
    posted = Exchange(AXIS, "an_op", Ledger(), {1: torch.ones(1)}, {1: torch.ones(1)})
    works[0].error = told
    with pytest.raises(RuntimeError) as error:
        posted.wait()
    assert ("an_op" in str(error.value)) == wrapped


def test_an_exchange_without_messages_posts_none_and_counts(works):
    """Ranks that have nothing to send or receive come to the same number of exchanges as the others."""
    ledger = Ledger()
    assert Exchange(AXIS, "an_op", ledger, {}, {}).wait() == {}
    assert works == [] and (ledger.posted, ledger.completed) == (1, 1)
    Exchange(AXIS, "an_op", ledger, {1: torch.ones(1)}, {}).wait()
    assert len(works) == 1 and (ledger.posted, ledger.completed) == (2, 2)


def test_messages_live_until_the_stream_of_computation_has_waited(works):
    """NCCL's stream reads and writes them until then, and the allocator would give their memory to others."""
    sent, buffer = torch.ones(3), torch.zeros(3)
    alive = [weakref.ref(sent), weakref.ref(buffer)]
    posted = Exchange(AXIS, "an_op", Ledger(), {1: sent}, {1: buffer})
    del sent, buffer
    assert all(tensor() is not None for tensor in alive)
    received = posted.wait()
    assert alive[0]() is None and received[1] is alive[1]()


def test_the_device_waits_and_the_host_runs_on(works, monkeypatch):
    """What is over is booked, without waiting for it; what is not is where the rank is."""
    stream = Stream(monkeypatch)
    ledger = Ledger()
    for op in ("first", "second"):
        with ledger.waiting(op, torch.device("cuda")):
            pass
    ledger.poll()
    assert ledger.position[:2] == ("the start", False) and (ledger.posted, ledger.completed) == (2, 0)
    stream.run_to(1)
    ledger.poll()
    stands = ledger.position
    assert stands[:2] == ("first", True)
    ledger.poll()
    assert ledger.position == stands, "since the same moment"
    stream.run_to(2)
    ledger.poll()
    assert ledger.position[:2] == ("first", False) and ledger.completed == 1
    stream.run_to(3)
    ledger.poll()
    assert ledger.position[:2] == ("second", True)
    with ledger.standing("agreement"):
        assert ledger.position[:2] == ("second", True), "the host is ahead"
        stream.run_to(4)
        ledger.poll()
        assert ledger.position[:2] == ("agreement", True) and ledger.completed == 2
    assert ledger.position[:2] == ("agreement", False)
    assert stream.synchronized == 0
    assert {op: entry.waited_s for op, entry in ledger.by_op().items()} == {"first": 0.001, "second": 0.001}


def test_events_are_used_again_though_nobody_asks_for_the_figures(monkeypatch):
    """A device that is up to three waits behind: as many events as those have, and two that the host is at."""
    stream = Stream(monkeypatch)
    ledger = Ledger()
    for i in range(1000):
        with ledger.waiting("an_op", torch.device("cuda")):
            pass
        stream.run_to(2 * (i - 2))
    assert stream.made <= 2 * (3 + 2) and ledger.posted == 1000
    assert stream.synchronized == 0
    stream.run_to(2000)
    assert ledger.total().waited_s == pytest.approx(1.0)


def order_of_a_step(cp, config):
    """What a rank posts in a training step, in order: (exchanges, all-reduces and gradients that are ready for DDP's;
    single messages)."""
    log, messages = [], []
    original_exchange, original_post, original_reduce = Exchange.__init__, dist.batch_isend_irecv, dist.all_reduce

    def exchanges(self, axis: Axis, op: str, *args) -> None:
        log.append(f"{op} on {axis.name}")
        original_exchange(self, axis, op, *args)

    def posts(batch: list) -> list:
        messages.extend(
            ("send" if m.op is dist.isend else "receive", m.peer, tuple(m.tensor.shape), m.tensor.dtype) for m in batch
        )
        return original_post(batch)

    def reduces(x: torch.Tensor, *args, **kwargs) -> None:
        log.append(f"all-reduce of {tuple(x.shape)}")
        original_reduce(x, *args, **kwargs)

    (batch,) = batches_of_data(config, cp.grid, 1)
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: log.append(f"gradient of {name}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "__init__", exchanges)
        patch.setattr(dist, "batch_isend_irecv", posts)
        patch.setattr(dist, "all_reduce", reduces)
        module.micro_batch(batch, 1)["loss"].backward()
        all_at_once(cp)
    return log, messages


def all_at_once(cp):
    """Uneven pieces in flight along all axes together, some of them of nothing, waited for in another order.

    Returns what this rank has fetched of each axis, and the gradient of what it gave.
    """
    pending, given = [], []
    for name, axis in {"row": cp.row, "col": cp.col, "all": cp.all}.items():
        # Rank i of the axis has i rows, the first of them none, and wants those of one after it: among all ranks of one
        # in the next row of the grid, so that the same two meet along several axes.
        has = tuple(((i * (i - 1) // 2, i * (i + 1) // 2),) for i in range(axis.size))
        ahead = cp.grid.cols if axis is cp.all else 1
        wants = has[ahead:] + has[:ahead]
        first, last = has[axis.index][0]
        x = (1000.0 * axis.ranks[0] + torch.arange(first, last, dtype=torch.float64)).requires_grad_()
        given.append(x)
        pending.append((name, axis, wants[axis.index][0], start(x, cp, axis, (0,), has, wants, f"{name} axis")))
    fetched = [(axis, wanted, finish(handle)) for _, axis, wanted, handle in reversed(pending)]
    sum((out * out).sum() for *_, out in fetched).backward()
    for axis, (first, last), out in fetched:
        assert torch.equal(out, 1000.0 * axis.ranks[0] + torch.arange(first, last, dtype=torch.float64))
    for x in given:
        # Whoever has fetched it has squared it.
        assert torch.equal(x.grad, 2 * x.detach())
    return True


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), pytest.param((3, 3), marks=pytest.mark.slow)])
def test_exchanges_of_all_axes_in_flight_together(ranks, shape):
    assert all(ranks.run(all_at_once, *shape))


def test_everything_that_goes_through_one_group_is_in_one_order_on_all_ranks(ranks):
    """NCCL and gloo match messages of two ranks by their order alone, whatever axis they belong to. NCCL also does one
    thing after the other, so what it does for DDP must come at the same point between them."""
    logs, messages = zip(*ranks.run(order_of_a_step, 3, 3, compose([*SMALL, "data.val=[]", "optim.ema_decay=0"])))
    assert all(log == logs[0] for log in logs)
    backward = next(i for i, line in enumerate(logs[0]) if line.startswith("gradient"))
    assert {line.split(" ")[-1] for line in logs[0][backward:] if " on " in line} == {"cp_row", "cp_col", "cp"}
    met = 0
    for p, q in permutations(range(9), 2):
        sent = [message[2:] for message in messages[p] if message[:2] == ("send", q)]
        assert sent == [message[2:] for message in messages[q] if message[:2] == ("receive", p)], (p, q)
        met += bool(sent)
    assert met > 36, "most pairs exchange something"
    assert not any(0 in shape for sent in messages for _, _, shape, _ in sent), "nothing is sent of nothing"


def groups_of(cp):
    world = dist.group.WORLD
    return [axis.group is None or ("world" if axis.group is world else axis.group.size()) for axis in
            (cp.row, cp.col, cp.all)]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dp", "groups"),
    [((1, 3), 1, [True, "world", "world"]), ((3, 1), 1, ["world", True, "world"]), ((2, 3), 1, [2, 3, "world"]),
     ((1, 2), 2, [True, 2, 2]), ((2, 1), 2, [2, True, 2]), ((1, 1), 3, [True, True, True])],
)  # fmt: skip
def test_there_are_no_groups_that_nobody_needs(ranks, shape, dp, groups):
    assert ranks.run(groups_of, *shape, dp=dp) == [groups] * (dp * shape[0] * shape[1])


def test_axes_of_the_same_ranks_share_a_group(ranks):
    assert all(ranks.run(one_group, 1, 2, dp=2))


def one_group(cp):
    return cp.col.group is cp.all.group
