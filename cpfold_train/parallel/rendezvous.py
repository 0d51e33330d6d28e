"""How the ranks of one machine find each other."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from cpfold_train.parallel.context import bound_device


def open_rendezvous() -> dist.TCPStore:
    """The store at which ranks meet, on a free port that is held from now on, for as long as the store lives.

    The store that ``init_process_group`` makes on rank 0 shares it, if in the same process.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def join_rendezvous(folder: Path, rank: int, world_size: int, device: torch.device) -> None:
    """Start the default process group of ranks that share a folder, which no port is needed for.

    Args:
        folder: an empty one.
        rank: of this process.
        world_size: number of ranks.
        device: on which they compute.
    """
    backend, store = dist.get_default_backend_for_device(device), dist.FileStore(str(folder / "ranks"), world_size)
    if device.type == "cuda":
        # On which NCCL looks for the messages, whatever device they are on.
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound_device(device))
