"""A model for prediction, from a checkpoint alone."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cpfold_train.checkpoints.boltz import initialise, read_checkpoint
from cpfold_train.checkpoints.export import model_config
from cpfold_train.checkpoints.features import features_of, told_features
from cpfold_train.errors import ConfigError
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, ModelConfig

AVERAGE, RAW = "average", "raw"
"""Weights of a checkpoint: their moving average, and those under training."""


@dataclass(frozen=True)
class Weights:
    """Which weights a prediction is made with.

    Attributes:
        path: of the checkpoint, as it was typed.
        step: of the run that wrote it; None where it does not say.
        weights: ``average`` or ``raw``.
        fingerprint: of the content; the same wherever the file lies.
    """

    path: str
    step: int | None
    weights: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.path}, step {'unknown' if self.step is None else self.step}, {self.weights} weights"


def choose_weights(path: Path, weights: str | None) -> Weights:
    """The weights of a checkpoint that are asked for; by default the average of a run of ours, and of other checkpoints
    those that the package runs with.

    Raises:
        ConfigError: it is no checkpoint, or has no average.
    """
    checkpoint = read_checkpoint(path)
    ours = "current_model_state" in checkpoint
    if weights == AVERAGE and not (ours or "ema" in checkpoint):
        raise ConfigError(f"{path} has no moving average of the weights: type --weights raw")
    chosen = weights or (AVERAGE if ours else RAW)
    return Weights(str(path), checkpoint.get("global_step"), chosen, _fingerprint(path))


def load_model(path: Path, weights: str) -> CoFolding:
    """The model of a checkpoint of a run of ours, or Boltz-2, with its ``average`` or ``raw`` weights.

    Raises:
        ConfigError: it is neither.
    """
    checkpoint = read_checkpoint(path)
    ours = "model" in (checkpoint.get("hyper_parameters") or {})
    model = CoFolding(model_config(checkpoint, path) if ours else ModelConfig(), MemoryConfig())
    initialise(model, path, "ema" if weights == AVERAGE else "raw")
    return model.eval()


def choose_features(path: Path, typed: str | None) -> tuple[str, str | None]:
    """The features of a prediction: those that are typed, else the checkpoint's; and a sentence where these differ."""
    checkpoint = read_checkpoint(path)
    features = typed or features_of(checkpoint)
    return features, told_features(features, checkpoint, path, "--features ")


def _fingerprint(path: Path) -> str:
    """Of the checksums that torch writes beside all that it stores, so that gigabytes need not be read."""
    digest = hashlib.sha256()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as stored:
            for info in stored.infolist():
                # The first part is the name that the file had when it was written.
                name = info.filename.partition("/")[2]
                digest.update(f"{name} {info.file_size} {info.CRC}\n".encode())
    else:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
