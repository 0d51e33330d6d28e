"""The Lightning strategy: data parallelism over the whole world, one sample shared by each grid of ranks."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid


class GridStrategy(DDPStrategy):
    """``DistributedDataParallel`` over dp x cp ranks; samples are divided over dp only.

    Every gradient on a rank is a partial sum, and each rank's loss is its share of the sample's loss times the number
    of ranks that share it. DDP's mean over the world is then the sum over the grid and the mean over the replicas.
    Bucketed, overlapped reduction and ``no_sync`` under accumulation are DDP's own.

    Args:
        rows: R, tiles along the first pair dim.
        cols: C, tiles along the second pair dim.
        dp: number of replicas.
        timeout: how long a rank may wait for another before that is an error.
        algorithm: how the triangle ops communicate.
        kernels: what computes the attention within complete rows.
        kwargs: for ``DDPStrategy``.

    Attributes:
        grid: its geometry.
        cp: the running grid, from ``setup_distributed`` on.
    """

    cp: ContextParallel

    def __init__(
        self, rows: int, cols: int, dp: int, timeout: timedelta, algorithm: str, kernels: str, **kwargs: Any
    ) -> None:
        super().__init__(
            timeout=timeout,
            gradient_as_bucket_view=True,
            **kwargs,
        )
        self.grid = Grid(rows, cols, dp)
        self._algorithm, self._kernels = algorithm, kernels

    def setup_distributed(self) -> None:
        super().setup_distributed()
        self.grid = replace(self.grid, rank=self.global_rank)
        self.cp = ContextParallel(self.grid, self.root_device.type, self._timeout, self._algorithm, self._kernels)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Every rank of a replica reads the same samples."""
        return {"num_replicas": self.grid.dp, "rank": self.grid.dp_index}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(filepath)
        if not path.is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Of a run with FSDP: a file cannot replace a directory in one step.
        written = path.with_name(f"{path.name}.new")
        super().save_checkpoint(checkpoint, written, storage_options)
        if self.is_global_zero:
            shutil.rmtree(path)
            written.rename(path)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            _end(self.launcher.procs)


def _end(processes: list[subprocess.Popen]) -> None:
    """End the ranks started by this one, which would otherwise wait for it until their exchange times out.

    They get a few seconds to end by themselves: where one of them is the cause, its traceback must reach the screen.
    """
    deadline = time.monotonic() + 5
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
