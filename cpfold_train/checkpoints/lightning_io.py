"""Checkpoints of one file, written such that a checkpoint which is there can be read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from cpfold_train.errors import ConfigError
from cpfold_train.whole_file import whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and exchanges the two in one step.

    Lightning writes to the system's directory for temporary files, from which a checkpoint on another file system is
    copied: a process killed meanwhile leaves half of ``last.ckpt``. It also holds the file in memory once more.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(Path(path), "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raise ConfigError where the file is no checkpoint, or none to resume from."""
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = (str(error).splitlines() or ["it is empty"])[0]
            raise ConfigError(f"ckpt_path={path} cannot be read: {reason}: type the path of another") from error
        if not isinstance(checkpoint, dict) or "optimizer_states" not in checkpoint:
            raise ConfigError(
                f"ckpt_path={path} has no state of an optimizer to resume from: type model.init_from={path} instead, "
                "which starts from its weights"
            )
        return checkpoint
