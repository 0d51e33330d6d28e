"""Parameters, their gradients and the optimizer's state sharded over all ranks, by torch's FSDP2.

A parameter is a DTensor of which each rank has its rows. What a block computes with are plain tensors, gathered when
the block is entered and freed when it is left, and once more for its backward pass. Gradients are the mean over all
ranks, as those of ``DistributedDataParallel``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cpfold_train.parallel.context import ContextParallel

ShardedParameter = FSDPParam
"""A parameter that is sharded, with what is gathered of it for a while."""

Entrance = tuple[nn.Module, str]
"""A module and the name of a method of it, other than ``forward``, by which it is entered."""


def shard_parameters(
    root: nn.Module, blocks: Iterable[nn.Module], entrances: Iterable[Entrance], cp: ContextParallel
) -> None:
    """Shard the parameters of a model, in place.

    Args:
        root: the model. What is in no block is gathered for the whole of its forward pass.
        blocks: parts of it, none within another, of which one at a time is gathered.
        entrances: of ``root`` and ``blocks``.
        cp: the running grid.
    """
    mesh = world_mesh(cp)
    for module in (*blocks, root):
        # Said explicitly: the default keeps the root's gathered, and a list of parameters then has plain ones.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module, method in entrances:
        register_fsdp_forward_method(module, method)


def world_mesh(cp: ContextParallel) -> DeviceMesh:
    """All ranks of the world along one axis, on the group that has the run's timeout."""
    return DeviceMesh.from_group(dist.group.WORLD, cp.mesh.device_type, mesh_dim_names=("world",))


def mesh_of(module: nn.Module) -> DeviceMesh:
    """That over which the parameters of a module are sharded."""
    return next(module.parameters()).device_mesh


def shard(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor that every rank holds, as a parameter of its shape is sharded. Nothing is sent."""
    return distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, whole on every rank; a collective if it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """What this rank has of a tensor that may be sharded, in the same memory."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def sharded_empty(like: Tensor, mesh: DeviceMesh) -> DTensor:
    """An uninitialised tensor of the shape and dtype of ``like``, sharded."""
    return torch.distributed.tensor.empty(like.shape, dtype=like.dtype, device_mesh=mesh, placements=[Shard(0)])
