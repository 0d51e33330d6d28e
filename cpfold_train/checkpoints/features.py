"""Which features the weights of a checkpoint are trained with, and what is said where others are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpfold_train.vocabulary import BOLTZ2, CORRECTED


def features_of(checkpoint: dict[str, Any]) -> str:
    """One of :data:`~cpfold_train.vocabulary.FEATURE_SETS`: what the checkpoint says.

    One of ours that says nothing is of before there was a choice, and one that is not ours is Boltz-2's.
    """
    ours = (checkpoint.get("hyper_parameters") or {}).get("model")
    return checkpoint.get("features") or (BOLTZ2 if ours is None else ours.get("features", CORRECTED))


def told_features(features: str, checkpoint: dict[str, Any], path: Path | str, option: str) -> str | None:
    """One sentence where the weights of a checkpoint get other features than they are trained with.

    Args:
        features: those that are made.
        checkpoint: where the weights are from.
        path: of the checkpoint.
        option: what sets the features, as it is typed.
    """
    trained = features_of(checkpoint)
    if trained == features:
        return None
    return f"{path} is trained with the features {trained}, and gets {features}: type {option}{trained} to keep them"
