"""What is known of a complex before it is predicted, and its crop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.features.conditioning import Condition
from cpfold_train.data.features.templates import Template
from cpfold_train.data.stream.batch import Crop, make_crop
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.random import key_of
from cpfold_train.vocabulary import CORRECTED


@dataclass(frozen=True)
class Complex:
    """A complex to predict.

    Attributes:
        structure: its atoms, of which none is resolved where the truth is unknown.
        alignments: by entity.
        templates: those that the model sees.
        conditions: pockets and contacts that the user gives away, in tokens of the structure.
    """

    structure: Structure
    alignments: dict[int, Alignment]
    templates: list[Template] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)


def crop_of(given: Complex, crop_size: int | None, max_msa_rows: int, seed: int, features: str = CORRECTED) -> Crop:
    """The whole complex, or a crop of it: around a token where the truth is known, else a stretch of each chain.

    What is random about it depends on the seed and on the complex's id, not on which others are predicted.

    Args:
        crop_size: most tokens, None for no limit.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
    """
    structure = given.structure
    crop = make_crop(
        structure,
        given.alignments,
        given.templates,
        crop_size=len(structure) if crop_size is None else crop_size,
        max_msa_rows=max_msa_rows,
        features=features,
        crop={"spatial" if structure.center[1].any() else "contiguous": 1.0},
        draw=(key_of(seed, "predict", structure.meta["id"]), 0, 0),
    )
    position = np.full(len(structure), -1)
    position[crop.tokens] = np.arange(len(crop.tokens))
    return replace(crop, conditions=[_moved(condition, position) for condition in given.conditions])


def _moved(condition: Condition, position: np.ndarray) -> Condition:
    """The condition in tokens of a crop; ``position`` (L,) is -1 for tokens outside."""
    rows, columns = (position[tokens][position[tokens] >= 0] for tokens in (condition.rows, condition.columns))
    return condition._replace(rows=rows, columns=columns)
