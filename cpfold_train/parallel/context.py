"""The running grid: device mesh, process groups and ledger behind a :class:`~cpfold_train.parallel.grid.Grid`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.ledger import Ledger

REPLICATED: tuple[Placement, ...] = (Replicate(), Replicate())
"""Placement of single and token features over (cp_row, cp_col)."""

TILED: tuple[Placement, ...] = (Shard(1), Shard(2))
"""Placement of pair and MSA features over (cp_row, cp_col)."""

SHARED_OUT: tuple[Placement, ...] = (Shard(1), Shard(1))
"""Placement of atom features over (cp_row, cp_col): one share a rank, row of the grid by row of the grid."""


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank exchanges with along one axis of the mesh.

    Attributes:
        name: ``cp_row``, ``cp_col`` or ``cp`` (both, row by row).
        size: number of ranks.
        index: this rank's place among them.
        ranks: their global ranks, in order.
        group: their process group.
    """

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup


class ContextParallel:
    """The context-parallel side of this rank: what the ops take as ``cp``.

    Attributes:
        grid: geometry, and this rank's coordinates.
        mesh: device mesh with axes ``("dp", "cp_row", "cp_col")``.
        row: ranks of the same column; moving along it changes the tile's row (mesh axis ``cp_row``).
        col: ranks of the same row; moving along it changes the tile's column (mesh axis ``cp_col``).
        all: every rank of the replica.
        host: the same ranks, for small messages between hosts that must not wait for what the GPUs have to do.
        ledger: what this rank sent and waited for.
        algorithm: how the triangle ops communicate.
        kernels: what computes attention and the local parts of the pair stack: ``torch``, ``triton`` or
            ``cuequivariance``.
    """

    def __init__(
        self,
        grid: Grid,
        device_type: str = "cpu",
        timeout: timedelta = timedelta(minutes=30),
        algorithm: str = "auto",
        kernels: str = "torch",
    ) -> None:
        """Build the mesh on the default process group, which is started where there is none: on its own for a world of
        one rank, else from the launcher's environment variables.

        Args:
            grid: the grid; its ``world_size`` must be the size of the default process group.
            device_type: ``"cpu"`` or ``"cuda"``.
            timeout: how long an exchange may take before it is an error.
            algorithm: ``alltoall``, ``ring`` or ``auto`` for the triangle ops; see :mod:`cpfold_train.parallel.cost`.
            kernels: ``torch``, ``triton`` or ``cuequivariance``; see :mod:`cpfold_train.kernels.choice`.
        """
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(device_type)
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if grid.world_size == 1 else {}
            dist.init_process_group(backend, timeout=timeout, **alone)
        if dist.get_world_size() != grid.world_size:
            raise ValueError(f"the grid has {grid.world_size} ranks, the process group {dist.get_world_size()}")
        self.grid = grid
        self.algorithm = algorithm
        self.kernels = kernels
        self.ledger = Ledger()
        ranks = torch.arange(grid.world_size).reshape(grid.dp, grid.rows, grid.cols)
        self.mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("dp", "cp_row", "cp_col"))
        self.cp_mesh = self.mesh["cp_row", "cp_col"]
        own = ranks[grid.dp_index]
        self.row = self._axis("cp_row", self.mesh["cp_row"].get_group(), own[:, grid.col])
        self.col = self._axis("cp_col", self.mesh["cp_col"].get_group(), own[grid.row])
        self.all = self._axis("cp", self.cp_mesh._flatten("cp").get_group(), own.flatten())
        if dist.get_backend() != "fake":
            for axis in (self.row, self.col, self.all):
                # Groups made by a mesh keep the default of 30 minutes whatever the world's timeout is.
                dist.distributed_c10d._set_pg_timeout(timeout, axis.group)
        self.host = self.all
        if dist.get_backend() == "nccl" and grid.cp_size > 1:
            replicas = ranks.flatten(1).tolist()
            group, _ = dist.new_subgroups_by_enumeration(replicas, timeout, "gloo", group_desc="host")
            self.host = replace(self.all, group=group)

    def _axis(self, name: str, group: dist.ProcessGroup, ranks: Tensor) -> Axis:
        members = tuple(ranks.tolist())
        return Axis(name, len(members), members.index(self.grid.rank), members, group)

    def tiled(self, tile: Tensor) -> DTensor:
        """Wrap this rank's tile (B, N/R, N/C, ...) or MSA block (B, S/R, N/C, ...) as a DTensor, Shard(1) x Shard(2).

        The DTensor lives on the (cp_row, cp_col) part of the mesh: replicas hold different samples of different sizes,
        so there is no global tensor over ``dp``.
        """
        return DTensor.from_local(tile, self.cp_mesh, TILED, run_check=False)

    def shared_out(self, share: Tensor) -> DTensor:
        """Wrap this rank's share (B, A/RC, ...) of the atoms as a DTensor, Shard(1) x Shard(1)."""
        return DTensor.from_local(share, self.cp_mesh, SHARED_OUT, run_check=False)

    def replicated(self, value: Tensor) -> DTensor:
        """Wrap a value (B, N, ...) that every rank of the replica holds whole as a DTensor, Replicate x Replicate.

        Its gradient on a rank is that rank's share, not the sum: nothing is reduced when it flows back.
        """
        return DTensor.from_local(value, self.cp_mesh, REPLICATED, run_check=False)


def to_local(values: dict[str, Any]) -> dict[str, Any]:
    """This rank's parts of a dict of DTensors; what is none stays as it is."""
    return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in values.items()}


@contextmanager
def fake_world(
    grid: Grid, algorithm: str = "auto", kernels: str = "torch", device_type: str = "cpu"
) -> Iterator[ContextParallel]:
    """One rank of a world that is not there: messages are counted and go nowhere.

    Raises:
        RuntimeError: where a process group is already running.
    """
    if dist.is_initialized():
        raise RuntimeError("a simulated world needs a process of its own: a process group is already running here")
    # Importing the module registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=grid.rank, world_size=grid.world_size)
    try:
        yield ContextParallel(grid, device_type, algorithm=algorithm, kernels=kernels)
    finally:
        dist.destroy_process_group()
