"""Checkpoints of one file, written such that a checkpoint which is there can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from cpfold_train.whole_file import whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and exchanges the two in one step.

    Lightning writes to the system's directory for temporary files, from which a checkpoint on another file system is
    copied: a process killed meanwhile leaves half of ``last.ckpt``. It also holds the file in memory once more.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(Path(path), "wb") as file:
            torch.save(checkpoint, file)
