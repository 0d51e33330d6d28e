"""Global alignment of two sequences of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from biotite.sequence import Alphabet, GeneralSequence
from biotite.sequence.align import SubstitutionMatrix, align_optimal

MOST_PAIRS = 1 << 26
"""Pairs of symbols up to which two sequences are aligned as a whole; there are as many in two of 8,192."""
_PAIRS_OF_PIECES = 1 << 20
"""Pairs of symbols up to which the pieces of longer sequences are."""
_WORD = 32
"""Symbols of a word at which long sequences are split."""


def align(query: Sequence[str], target: Sequence[str], most_pairs: int | None = None) -> np.ndarray:
    """Align a query (letters or residue names) with a target that may be longer.

    The optimal alignment takes some ten bytes for each pair of symbols. Longer sequences are split at words that occur
    once in each: they are the same chain but for some residues.

    Args:
        most_pairs: above which they are split, by default ``MOST_PAIRS``.

    Returns:
        (len(query),) int64: index in the target of each query symbol, -1 where it has none.
    """
    if list(query) == list(target):
        return np.arange(len(target))
    if len(query) * len(target) > (MOST_PAIRS if most_pairs is None else most_pairs):
        split = _shared_word(query, target)
        if split is not None:
            # In the middle of the word, so that both sides end or begin with symbols that agree.
            i, j = (start + _WORD // 2 for start in split)
            before = align(query[:i], target[:j], _PAIRS_OF_PIECES)
            after = align(query[i:], target[j:], _PAIRS_OF_PIECES)
            return np.concatenate([before, np.where(after < 0, -1, after + j)])
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
    found = np.full(len(query), -1, dtype=np.int64)
    both = (trace >= 0).all(axis=1)
    found[trace[both, 0]] = trace[both, 1]
    return found


def _shared_word(query: Sequence[str], target: Sequence[str]) -> tuple[int, int] | None:
    """Where a word begins that occurs once in the query and once in the target, the one nearest to the query's middle;
    None where there is none."""
    words, others = (
        [tuple(names[start : start + _WORD]) for start in range(len(names) - _WORD + 1)] for names in (query, target)
    )
    count, count_others = Counter(words), Counter(others)
    shared = [start for start, word in enumerate(words) if count[word] == count_others[word] == 1]
    if not shared:
        return None
    start = min(shared, key=lambda start: abs(start - len(words) // 2))
    return start, others.index(words[start])
