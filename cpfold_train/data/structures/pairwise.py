"""Global alignment of two sequences of names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from biotite.sequence import Alphabet, GeneralSequence
from biotite.sequence.align import SubstitutionMatrix, align_optimal


def align(query: Sequence[str], target: Sequence[str]) -> np.ndarray:
    """Place a query (letters or residue names) in a target that may be longer.

    Returns:
        (len(query),) int64: index in the target of each query symbol, -1 where it has none.
    """
    if list(query) == list(target):
        return np.arange(len(target))
    alphabet = Alphabet(sorted({*query, *target}))
    scores = np.where(np.eye(len(alphabet), dtype=bool), 5, -4).astype(np.int32)
    trace = align_optimal(
        GeneralSequence(alphabet, query),
        GeneralSequence(alphabet, target),
        SubstitutionMatrix(alphabet, alphabet, scores),
        gap_penalty=(-3, 0),  # unresolved stretches are long, and the short pieces between them still count
        terminal_penalty=False,
        max_number=1,
    )[0].trace
    place = np.full(len(query), -1, dtype=np.int64)
    both = (trace >= 0).all(axis=1)
    place[trace[both, 0]] = trace[both, 1]
    return place
