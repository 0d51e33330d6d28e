"""A pool of processes that serve as ranks, started once and used by all tests."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid


class RankPool:
    """Runs module-level functions on a grid of ranks.

    The processes are forked when they are first needed, so they know every module that the tests have imported. The
    process group is kept from one call to the next as long as the size of the world stays the same.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._workers = []
        self._world, self._epoch = 0, 0

    def run(self, function, rows: int, cols: int, *args, dp: int = 1) -> list:
        """``function(cp, *args)`` on every rank of a grid; results in the order of ranks.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        torch.set_num_threads(1)
        self._workers = self._workers or [self._start(rank) for rank in range(self._size)]
        world = dp * rows * cols
        if world != self._world:
            self._world, self._epoch = world, self._epoch + 1
        for rank in range(world):
            self._workers[rank][1].send((self._epoch, function, Grid(rows, cols, dp, rank), args))
        answers = [self._workers[rank][1].recv() for rank in range(world)]
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()

    def _start(self, rank: int):
        context = mp.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, theirs, ours, self._folder), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _serve(rank: int, pipe, other_end, folder: Path) -> None:
    other_end.close()
    torch.set_num_threads(1)
    contexts: dict[Grid, ContextParallel] = {}
    current = 0
    while True:
        try:
            epoch, function, grid, args = pipe.recv()
        except EOFError:
            return
        try:
            if epoch != current:
                if dist.is_initialized():
                    dist.destroy_process_group()
                contexts.clear()
                current = epoch
                store = dist.FileStore(str(folder / f"world-{epoch}"), grid.world_size)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=grid.world_size, timeout=timedelta(seconds=60)
                )
            if grid not in contexts:
                contexts[grid] = ContextParallel(grid, timeout=timedelta(seconds=60))
            contexts[grid].ledger.reset()
            contexts[grid].algorithm = "auto"
            answer = True, function(contexts[grid], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
