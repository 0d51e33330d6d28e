"""What a planner may do otherwise, and that a run does nothing otherwise."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpfold_train import dry_run
from cpfold_train.kernels.by_rows import in_blocks
from cpfold_train.simulate.shortened import Shortened
from cpfold_train.simulate.trace import Tracer
from cpfold_train.simulate.work_counter import MEMORY, Speed


def tracer() -> Tracer:
    return Tracer(Speed(lambda kernel: (MEMORY, 1.0), lambda *_: 0.0), 0)


def test_a_run_goes_through_all_blocks_and_messages():
    assert list(dry_run.each_block([1, 2, 3], int)) == list(dry_run.each_message([1, 2, 3], int)) == [1, 2, 3]


def doubled(short: bool) -> tuple[list[int], float]:
    """Rows of each turn, and bytes that are counted, of ten rows that are doubled four at a time."""
    turns = []

    def double(x: torch.Tensor) -> torch.Tensor:
        turns.append(x.shape[1])
        return x * 2

    with FakeTensorMode(), tracer() as counting:
        x = torch.empty(1, 10, 3)
        with dry_run.dry(Shortened(counting, on_host=False)) if short else nullcontext():
            in_blocks(double, 4, (x,), ())
        return turns, counting.counter.moved_bytes


def test_two_blocks_count_for_all():
    """The second block stands for six rows, which are one and a half of it."""
    (all_turns, moved), (turns, moved_short) = doubled(False), doubled(True)
    assert (all_turns, turns) == ([4, 4, 2], [4, 4])
    assert moved_short == moved


def test_one_message_counts_for_all_of_its_shape():
    counting = tracer()
    with FakeTensorMode(), counting, dry_run.dry(Shortened(counting, on_host=False)):
        for size in dry_run.each_message([4, 4, 8, 4], int):
            counting.send("there", size, 1)
            torch.empty(size).zero_()
    assert (counting.counter.sent_bytes["there"], counting.counter.messages["there"]) == (20, 4)
    assert (counting.counter.kernels, counting.counter.moved_bytes) == (4, 4 * 20)


def test_what_goes_to_the_host_is_not_held_on_the_device():
    for on_host in (True, False):
        counting = tracer()
        with FakeTensorMode(), counting, dry_run.dry(Shortened(counting, on_host)):
            x = torch.empty(8)
            before = counting.now
            with dry_run.to_host():
                kept = torch.empty(8).copy_(x)
            with dry_run.from_host():
                x.copy_(kept)
            assert counting.now - before == (kept.nbytes if on_host else 0)
            assert counting.counter.host_bytes == (0 if on_host else 2 * x.nbytes)
