"""The running grid: device mesh, process groups and ledger behind a :class:`~cpfold_train.parallel.grid.Grid`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

SHARDED: tuple[Placement, ...] = (Shard(1), Shard(1))
"""Placement of atom features over (cp_row, cp_col): one shard a rank, row of the grid by row of the grid."""


NCCL_MARGIN = timedelta(seconds=60)
"""By how much NCCL's own timeout is longer than that of a run: it ends the process without a word on who is missing, so
the watch (:mod:`cpfold_train.parallel.watch`) has to come before it, with the traces of all ranks. NCCL counts from
when the host has posted an exchange, which may be seconds before the device has come to it."""

_Lines = tuple[tuple[int, ...], ...]
"""All parts of an axis, each with its ranks."""


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank exchanges with along one axis of the mesh.

    Attributes:
        name: ``cp_row``, ``cp_col`` or ``cp`` (both, row by row).
        size: number of ranks.
        index: this rank's position among them.
        ranks: their global ranks, in order.
        group: their process group, for collectives; None where this rank is alone. Messages from rank to rank need none
            (:class:`~cpfold_train.parallel.exchange.Exchange`).
    """

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None


class ContextParallel:
    """The context-parallel side of this rank: what the ops take as ``cp``.

    Attributes:
        grid: geometry, and this rank's coordinates.
        mesh: device mesh of this replica, with axes ``("cp_row", "cp_col")``. It is for DTensors and has no process
            groups.
        row: ranks of the same column; moving along it changes the tile's row (mesh axis ``cp_row``).
        col: ranks of the same row; moving along it changes the tile's column (mesh axis ``cp_col``).
        all: every rank of the replica.
        hosts: process group of all ranks of the world, for tensors on the host: what they tell each other must not
            wait for what the GPUs have to do.
        ledger: what this rank sent and waited for.
        timeout: how long an exchange may take before it is an error.
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
            if grid.world_size == 1:
                arguments = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            else:
                arguments = {"device_id": bound_device(torch.device(device_type))}
            dist.init_process_group(backend, timeout=timeout, **arguments)
        if dist.get_world_size() != grid.world_size:
            raise ValueError(f"the grid has {grid.world_size} ranks, the process group {dist.get_world_size()}")
        self.grid = grid
        self.algorithm = algorithm
        self.kernels = kernels
        self.timeout = timeout
        self.ledger = Ledger()
        if dist.get_backend() == "nccl":
            dist.distributed_c10d._set_pg_timeout(timeout + NCCL_MARGIN, dist.group.WORLD)
        ranks = torch.arange(grid.world_size).reshape(grid.dp, grid.rows, grid.cols)
        self.mesh = DeviceMesh(
            device_type, ranks[grid.dp_index], mesh_dim_names=("cp_row", "cp_col"), _init_backend=False
        )
        groups: dict[_Lines, dist.ProcessGroup | None] = {}
        self.row = self._axis("cp_row", ranks.mT.flatten(0, 1), groups)
        self.col = self._axis("cp_col", ranks.flatten(0, 1), groups)
        self.all = self._axis("cp", ranks.flatten(1), groups)
        self.hosts = dist.group.WORLD
        if dist.get_backend() == "nccl" and grid.world_size > 1:
            self.hosts = dist.new_group(backend="gloo", timeout=timeout, group_desc="hosts")

    def _axis(self, name: str, ranks: Tensor, groups: dict[_Lines, dist.ProcessGroup | None]) -> Axis:
        """This rank's part of an axis whose parts, one a row of ``ranks`` (parts, size), make up the world."""
        lines = tuple(map(tuple, ranks.tolist()))
        if lines not in groups:
            groups[lines] = self._group(name, lines)
        members = next(line for line in lines if self.grid.rank in line)
        return Axis(name, len(members), members.index(self.grid.rank), members, groups[lines])

    def _group(self, name: str, lines: _Lines) -> dist.ProcessGroup | None:
        """The process group of this rank's line. Every one of NCCL's has buffers on the device, hundreds of MiB once it
        is used (github.com/NVIDIA/nccl/issues/964; half a GiB for one of a single rank, issues/2363), so there is none
        that is not needed, and the world's serves where it can.

        All ranks of the world make all groups, and at the start: NCCL splits them off the world's communicator, which
        is a collective.
        """
        if len(lines[0]) == 1:
            return None
        if len(lines) == 1:
            return dist.group.WORLD
        timeout = self.timeout + NCCL_MARGIN if dist.get_backend() == "nccl" else self.timeout
        return dist.new_subgroups_by_enumeration(lines, timeout=timeout, group_desc=name)[0]

    def tiled(self, tile: Tensor) -> DTensor:
        """Wrap this rank's tile (B, N/R, N/C, ...) or MSA block (B, S/R, N/C, ...) as a DTensor, Shard(1) x Shard(2).

        The DTensor lives on the (cp_row, cp_col) part of the mesh: replicas hold different samples of different sizes,
        so there is no global tensor over ``dp``.
        """
        return DTensor.from_local(tile, self.mesh, TILED, run_check=False)

    def sharded(self, shard: Tensor) -> DTensor:
        """Wrap this rank's shard (B, A/RC, ...) of the atoms as a DTensor, Shard(1) x Shard(1)."""
        return DTensor.from_local(shard, self.mesh, SHARDED, run_check=False)

    def replicated(self, value: Tensor) -> DTensor:
        """Wrap a value (B, N, ...) that every rank of the replica holds whole as a DTensor, Replicate x Replicate.

        Its gradient on a rank is that rank's part, not the sum: nothing is reduced when it flows back.
        """
        return DTensor.from_local(value, self.mesh, REPLICATED, run_check=False)


def bound_device(device: torch.device) -> torch.device | None:
    """What ``init_process_group`` is to be given as ``device_id``; None on CPU.

    With it NCCL connects all ranks at once. Without, the first exchange would do so, in which ranks that have nothing
    to send or receive take no part, and the others would wait for them.
    """
    if device.type == "cpu":
        return None
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


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
