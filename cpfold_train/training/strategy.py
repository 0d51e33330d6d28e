"""The Lightning strategy: data parallelism over the whole world, one sample shared by each grid of ranks."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from cpfold_train.checkpoints.lightning_io import WholeCheckpointIO
from cpfold_train.checkpoints.sharded import INDEX
from cpfold_train.faults.mixin import FaultMixin
from cpfold_train.kernels.choice import Choice, capability_of, choose_kernels
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.training.launcher import RankLauncher
from cpfold_train.training.lightning_loop import OwnLauncher


def leave_out(module: LightningModule, *parts: str) -> None:
    """Let ``DistributedDataParallel`` have nothing to do with the parameters of parts that have no loss.

    Its own ``find_unused_parameters`` asks all ranks in each backward pass which parameters had a gradient, and the
    host waits until the GPU has the answer.
    """
    names = [name for name, _ in module.named_parameters() if name.startswith(tuple(f"{part}." for part in parts))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


class GridStrategy(FaultMixin, OwnLauncher, DDPStrategy):
    """``DistributedDataParallel`` over dp x cp ranks; samples are divided over dp only.

    Every gradient on a rank is a partial sum, and each rank's loss is its part of the sample's loss times the number
    of ranks that share it. DDP's mean over the world is then the sum over the grid and the mean over the replicas.
    Bucketed, overlapped reduction and ``no_sync`` under accumulation are DDP's own.

    Args:
        rows: R, tiles along the first pair dim.
        cols: C, tiles along the second pair dim.
        dp: number of replicas.
        timeout: how long a rank may wait for another before that is an error.
        algorithm: how the triangle ops communicate.
        kernels: what computes attention and the local parts of the pair stack; see :mod:`cpfold_train.kernels.choice`.
        kwargs: for ``DDPStrategy``.

    Attributes:
        grid: its geometry.
        cp: the running grid, from ``setup_distributed`` on.
        kernels: the kernels that were chosen, and why, from then on.
    """

    cp: ContextParallel
    kernels: Choice

    def __init__(
        self,
        rows: int,
        cols: int,
        dp: int = 1,
        timeout: timedelta = timedelta(minutes=30),
        algorithm: str = "auto",
        kernels: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            timeout=timeout,
            gradient_as_bucket_view=True,
            checkpoint_io=WholeCheckpointIO(),
            **kwargs,
        )
        self.grid = Grid(rows, cols, dp)
        self._algorithm, self._kernels = algorithm, kernels

    def make_launcher(self) -> RankLauncher:
        """What starts the other ranks of this machine."""
        return RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        self.grid = replace(self.grid, rank=self.global_rank)
        device, precision = self.root_device, str(self.precision_plugin.precision)
        self.kernels = choose_kernels(self._kernels, device.type, precision, capability_of(device))
        # On CPU there is no choice.
        if self._kernels == "auto" and device.type != "cpu" and self.is_global_zero:
            print(f"kernels=auto: {self.kernels.name}, because {self.kernels.why}", file=sys.stderr)
        self.cp = ContextParallel(self.grid, device.type, self._timeout, self._algorithm, self.kernels.name)
        self.start_watch()

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
            # It is complete as long as it has that.
            (path / INDEX).unlink(missing_ok=True)
            shutil.rmtree(path)
            written.rename(path)
