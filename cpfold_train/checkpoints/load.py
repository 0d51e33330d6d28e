"""A model for prediction, from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

from cpfold_train.checkpoints.boltz import initialise, read_checkpoint
from cpfold_train.checkpoints.export import model_config
from cpfold_train.checkpoints.features import features_of, told_features
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, ModelConfig


def load_model(path: Path) -> CoFolding:
    """The model of a checkpoint: of a run of ours with its averaged weights, or Boltz-2 as the package runs it.

    Raises:
        ConfigError: it is neither.
    """
    checkpoint = read_checkpoint(path)
    ours = "model" in (checkpoint.get("hyper_parameters") or {})
    model = CoFolding(model_config(checkpoint, path) if ours else ModelConfig(), MemoryConfig())
    initialise(model, path, "ema" if "current_model_state" in checkpoint else "raw")
    return model.eval()


def choose_features(path: Path, typed: str | None) -> tuple[str, str | None]:
    """The features of a prediction: those that are typed, else the checkpoint's; and a sentence where these differ."""
    checkpoint = read_checkpoint(path)
    features = typed or features_of(checkpoint)
    return features, told_features(features, checkpoint, path, "--features ")
