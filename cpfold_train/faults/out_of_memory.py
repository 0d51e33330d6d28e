"""Out of memory, by whatever name it comes, and what was allocated then."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

OUT_OF_MEMORY = (
    "out of memory: the same command with ckpt_path=last goes on and skips the steps noted in out_of_memory.txt; where "
    "it happens often, or not in a training step, type a smaller crop_size or a larger cp.grid"
)

_TOLD_BY = re.compile(
    "|".join(
        (
            # Host memory of torch's tensors, on Linux and elsewhere.
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            # cudaMalloc and cudaHostAlloc outside of torch's cache of device memory, the driver's virtual memory
            # (expandable segments), and what a kernel's launch reports of an earlier call.
            r"CUDA (driver )?error: out of memory",
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
            # Workspaces and handles of cuBLAS, cuDNN before and since 9, cuSOLVER and cuSPARSE.
            r"CU\w+_STATUS_ALLOC_FAILED",
            r"CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED",
            # Buffers of NCCL, which puts it after "Last error:".
            r"Cuda failure (\d+ )?'out of memory'",
            r"Failed to CUDA (host )?[cm]alloc",
            # Not "out of resource: shared memory", which a smaller crop would not help.
            r"Triton Error \[CUDA\]: out of memory",
        )
    )
)

_HISTORY = 100_000
"""Events, allocations and their ends, that are remembered; each takes some hundred bytes of host memory."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether torch, Python or a library found no memory on the device or on the host. Only torch's allocators, and not
    all of them, have an exception of their own for it."""
    if error is None:
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = isinstance(error, RuntimeError) and _TOLD_BY.search(str(error)) is not None
    return told or is_out_of_memory(error.__cause__)


def out_of_memory_sentence(error: BaseException) -> str:
    """What to say of it, with what :class:`MemorySnapshot` has noted."""
    return "; ".join([OUT_OF_MEMORY, *getattr(error, "__notes__", ())])


class MemorySnapshot(Callback):
    """Remembers from the start what is allocated on this rank's GPU and where in the code, and writes it at out of
    memory.

    To come before the callbacks that tell of an error, which gets the name of the file as a note.

    Args:
        folder: receives ``memory_rank_N.pickle``, which https://docs.pytorch.org/memory_viz shows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Stacks of Python alone: those of C++ take so long to gather that steps would be much slower.
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY, stacks="python")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"memory_rank_{trainer.global_rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        exception.add_note(f"{path} has what was allocated: open it at https://docs.pytorch.org/memory_viz")
