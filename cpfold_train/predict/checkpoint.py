"""A model for prediction, from a checkpoint alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from cpfold_train.errors import ConfigError
from cpfold_train.model.config import ModelConfig

if TYPE_CHECKING:
    from cpfold_train.model.cofolding import CoFolding

_PREFIX = "model."
"""Of the model's parameters among those of the training task."""


def load_model(path: Path) -> CoFolding:
    """The model of a checkpoint that training wrote, with its averaged weights.

    Raises:
        ConfigError: it is not such a checkpoint.
    """
    from cpfold_train.model.cofolding import CoFolding

    checkpoint = read_checkpoint(path)
    sizes = checkpoint.get("hyper_parameters", {}).get("model")
    if sizes is None:
        raise ConfigError(f"{path} does not say how large its model is: type a checkpoint that this program wrote")
    config: ModelConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), sizes))
    model = CoFolding(config)
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"{path} does not fit its model: it lacks {len(missing)} tensors ({', '.join(missing[:3])}) "
            f"and has {len(unexpected)} others ({', '.join(unexpected[:3])})"
        )
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; anything else in it is refused, since it could run code."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: type the path of a checkpoint, such as runs/.../last.ckpt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error
