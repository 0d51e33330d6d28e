"""Checkpoints to which every rank writes its own part, and which any number of ranks can read.

Such a checkpoint is a directory: ``meta.pt`` holds everything but the tensors that are sharded, instead of which there
are empty ones of their shape, and the name of the directory beside it in which those tensors are, in the format of
``torch.distributed.checkpoint``. ``meta.pt`` is written last, and replaced in one step: whatever it names is complete.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cpfold_train.errors import DiskFullError, RunError
from cpfold_train.parallel.sharding import sharded_empty
from cpfold_train.whole_file import disk_full_sentence, is_disk_full, whole_file

INDEX = "meta.pt"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether there is a complete one."""
    return (path / INDEX).is_file()


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, on all ranks together; one that is there stays until the new one is complete.

    Args:
        checkpoint: nested dicts and lists. What in them is no DTensor is written as the first rank has it.
        path: the directory, on a file system that all ranks share.

    Raises:
        DiskFullError: where there is no room, on all ranks.
        RunError: where it cannot be written for another reason.
    """
    shards: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    same: dict[str, str] = {}

    def take(name: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        first = first_names.setdefault(id(value), name)
        if first == name:
            shards[name] = value
        else:
            # Weights that are not trained are their own average.
            same[name] = first
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    # Here and below: the import takes half as long as torch's, and checks ask for no more than whether there is one.
    import torch.distributed.checkpoint as dcp

    index = {"checkpoint": _replaced(checkpoint, take), "same": same}
    agreed = [(str(path), f"shards-{uuid.uuid4().hex[:8]}")]
    dist.broadcast_object_list(agreed, src=0)
    folder, index["shards"] = Path(agreed[0][0]), agreed[0][1]
    target = folder
    if folder.is_file():
        # Of a run without FSDP: a directory cannot replace it in one step.
        target = folder.with_name(f"{folder.name}.new")
    try:
        dcp.save(shards, storage_writer=dcp.FileSystemWriter(target / index["shards"]))
    except dcp.api.CheckpointException as error:
        # It is no Exception, and all ranks have it.
        shutil.rmtree(target / index["shards"], ignore_errors=True)
        failures = [failure for failure, _ in error.failures.values()]
        if any(map(is_disk_full, failures)):
            raise DiskFullError(disk_full_sentence(folder)) from failures[0]
        raise RunError(f"{folder} could not be written: {failures[0]!r}") from failures[0]
    if dist.get_rank() == 0:
        _publish(index, target)
        if target != folder:
            folder.unlink()
            target.rename(folder)
    dist.barrier()


def _publish(index: dict[str, Any], folder: Path) -> None:
    """Make ``index`` the one that holds, and remove the shards of others."""
    with whole_file(folder / INDEX, "wb") as file:
        torch.save(index, file)
    _remove_all_but(index["shards"], folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of checkpoints in a directory, beside those that are complete."""
    for index in folder.glob(f"*/{INDEX}"):
        _remove_all_but(torch.load(index, map_location="cpu", weights_only=False)["shards"], index.parent)


def _remove_all_but(shards: str, checkpoint: Path) -> None:
    for other in checkpoint.iterdir():
        if other.is_dir() and other.name != shards:
            shutil.rmtree(other)


def load_sharded(path: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Read a checkpoint. It is a pickle, which can run code: read only those that you trust.

    Args:
        path: the directory.
        mesh: over which its tensors are to be sharded, however many ranks wrote them; all of its ranks read. None
            to read whole tensors in one process.
    """
    import torch.distributed.checkpoint as dcp

    index = read_index(path)
    wanted: dict[str, Tensor] = {}
    # Earlier versions wrote every tensor by its own name.
    same = index.get("same", {})

    def allocate(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if name in same:
            return wanted[same[name]]
        wanted[name] = torch.empty_like(value, device="cpu") if mesh is None else sharded_empty(value, mesh)
        return wanted[name]

    checkpoint = _replaced(index["checkpoint"], allocate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(path / index["shards"]), no_dist=mesh is None)
    return checkpoint


def read_index(path: Path) -> dict[str, Any]:
    """Everything of a checkpoint but its sharded tensors, which are empty."""
    return torch.load(path / INDEX, map_location="cpu", weights_only=False)


def _replaced(value: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """Nested dicts and lists with ``function(name, leaf)`` instead of each leaf."""
    if type(value) in (dict, OrderedDict):
        return {key: _replaced(x, function, f"{name}/{key}") for key, x in value.items()}
    if type(value) is list:
        return [_replaced(x, function, f"{name}/{i}") for i, x in enumerate(value)]
    return function(name, value)
