"""From one alignment per entity to the rows of the whole crop, and a rank's block of them.

The rule, chain by chain over the chains of the crop:

1. Row 0 is the query: every chain's own residues.
2. Paired rows: organisms (keys) found in at least two chains, those in most chains first and ties in the order of first
   appearance. An organism gives as many rows as it has sequences in the chain where it has most; a chain with fewer
   repeats its own in turn. A chain without the organism takes its next unused sequence, marked unpaired.
3. Unpaired rows: the sequences that are left, side by side. A chain that has run out of sequences has gaps.

At most ``MAX_PAIRED`` rows are paired and ``MAX_ROWS`` kept; profiles are over all of these, while the model sees
a random choice of ``max_msa_rows`` of them, always with the query.

With the features ``boltz2`` (:data:`~cpfold_train.vocabulary.FEATURE_SETS`) rows are those of
``boltz/data/feature/featurizerv2.py`` (``construct_paired_msa``): sequences of step 2 come again in step 3 and fill the
chains without the organism, an organism with several sequences in one chain alone is paired too, there are no
deletions, and profiles are over the rows that the model sees.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.schema import FEATURES
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Interval
from cpfold_train.vocabulary import BOLTZ2, CORRECTED, GAP, NUM_TOKENS, PROTEIN, TOKEN_IDS, UNKNOWN

MAX_ROWS = 16384
MAX_PAIRED = 8192
_DELETION_VALUE = (np.pi / 2 * np.arctan(np.arange(256) / 3)).astype(np.float32)


@dataclass(frozen=True)
class Segment:
    """The tokens of one chain in a crop: columns ``start:stop`` of it, at ``positions`` of the chain's alignment."""

    start: int
    stop: int
    positions: np.ndarray
    alignment: Alignment


@dataclass(frozen=True)
class Rows:
    """Rows of a crop with K chains.

    Attributes:
        segments: one for each chain.
        all: (S_all, K) int32 which sequence of the chain's alignment each row shows, -1 for gaps; those of profiles.
        sampled: (S, K) the rows drawn for the model, the query first.
        paired: (S, K) bool, for the sampled rows.
    """

    segments: list[Segment]
    all: np.ndarray
    sampled: np.ndarray
    paired: np.ndarray


def assemble(
    structure: Structure,
    tokens: np.ndarray,
    alignments: dict[int, Alignment],
    max_rows: int,
    rng: np.random.Generator | None,
    features: str = CORRECTED,
) -> Rows:
    """Assemble the rows of a crop and choose ``max_rows`` of them.

    Args:
        tokens: (n,) ascending tokens of the crop.
        alignments: by entity.
        rng: draws the rows; None takes the first ones.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
    """
    asym_id = structure.asym_id[tokens]
    starts = np.flatnonzero(np.diff(asym_id, prepend=-1))
    segments = []
    known: dict[int, Alignment] = {}
    for start, stop in zip(starts, [*starts[1:], len(tokens)]):
        entity = int(structure.chains["entity"][asym_id[start]])
        positions = structure.res_index[tokens[start:stop]]
        if entity not in known:
            chain = structure.asym_id == asym_id[start]
            given = alignments.get(entity, _query_only(structure.res_type[chain]))
            if features == BOLTZ2:
                res_type = np.where(structure.modified[chain], UNKNOWN[PROTEIN], structure.res_type[chain])
                given = _as_in_boltz2(given, res_type.astype(given.tokens.dtype))
            known[entity] = given
        segments.append(Segment(int(start), int(stop), positions, known[entity]))
    rows, paired = pair([segment.alignment.keys for segment in segments], features)
    drawn = np.arange(min(len(rows), max_rows))
    if rng is not None and len(rows) > max_rows:
        drawn[1:] = 1 + np.sort(rng.choice(len(rows) - 1, max_rows - 1, replace=False))
    sampled = rows[drawn]
    return Rows(segments, sampled if features == BOLTZ2 else rows, sampled, paired[drawn])


def _query_only(res_type: np.ndarray) -> Alignment:
    return Alignment(res_type[None], np.zeros((1, len(res_type)), np.uint8), np.array([UNPAIRED]))


def _as_in_boltz2(alignment: Alignment, res_type: np.ndarray) -> Alignment:
    """What the package shows of an alignment: deletions of the first row only, and as that row the chain's residues.

    Of an alignment whose first row differs from them elsewhere than in unknown residues, it shows nothing else.
    """
    query, unknown = alignment.tokens[0], UNKNOWN[PROTEIN]
    other = query != res_type
    methionine = (res_type == TOKEN_IDS["MET"]) & (query == unknown)
    if not ((res_type == unknown)[other].all() or methionine[other].all()):
        return _query_only(res_type)
    deletions = np.zeros_like(alignment.deletions)
    deletions[0] = alignment.deletions[0]
    tokens = np.concatenate([res_type[None], alignment.tokens[1:]]) if other.any() else alignment.tokens
    return Alignment(tokens, deletions, alignment.keys)


def pair(keys: list[np.ndarray], features: str = CORRECTED) -> tuple[np.ndarray, np.ndarray]:
    """Combine sequences of K chains to rows by their keys.

    Args:
        keys: of each chain's sequences.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.

    Returns:
        (S, K) int32 sequence shown by each row, -1 for gaps; and (S, K) bool, whether it is paired.
    """
    by_key: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for chain, chain_keys in enumerate(keys):
        for row in np.flatnonzero(chain_keys != UNPAIRED).tolist():
            by_key[int(chain_keys[row])].setdefault(chain, []).append(row)
    found = by_key.values()
    if features == BOLTZ2:
        several = [chains for chains in found if sum(map(len, chains.values())) > 1]
    else:
        several = [chains for chains in found if len(chains) > 1]
    shared = sorted(several, key=len, reverse=True)
    unused = [np.ones(len(chain_keys), dtype=bool) for chain_keys in keys]
    for chain_unused in unused:
        chain_unused[0] = False
    rows, paired = [[0] * len(keys)], [[True] * len(keys)]
    for chains in shared:
        for turn in range(max(map(len, chains.values()))):
            if len(rows) == MAX_PAIRED:
                break
            row = [-1] * len(keys)
            for chain, sequences in chains.items():
                row[chain] = sequences[turn % len(sequences)]
                unused[chain][row[chain]] &= features == BOLTZ2
            rows.append(row)
            paired.append([chain in chains for chain in range(len(keys))])
    shown, is_paired = np.array(rows, dtype=np.int32), np.array(paired)
    # Where a paired row has no sequence of a chain, it shows the chain's next one that is left.
    left = [np.flatnonzero(chain_unused) for chain_unused in unused]
    holes = [np.flatnonzero(shown[:, chain] < 0) for chain in range(len(keys))]
    for chain, hole in enumerate(holes):
        filled = hole[: len(left[chain])]
        shown[filled, chain], left[chain] = left[chain][: len(filled)], left[chain][len(filled) :]
    extra = np.full((min(max(map(len, left)), MAX_ROWS - len(shown)), len(keys)), -1, dtype=np.int32)
    for chain, sequences in enumerate(left):
        count = min(len(sequences), len(extra))
        extra[:count, chain] = sequences[:count]
    return np.concatenate([shown, extra]), np.concatenate([is_paired, np.zeros(extra.shape, dtype=bool)])


def profile(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean over ``rows.all``.

    Returns:
        (n, 33) float32 frequency of each token, gaps included, and (n,) float32 mean deletion value.
    """
    n = rows.segments[-1].stop
    frequency = np.zeros((n, NUM_TOKENS), dtype=np.float64)
    deletion = np.zeros(n, dtype=np.float64)
    for chain, segment in enumerate(rows.segments):
        shown = rows.all[:, chain]
        # A sequence that several rows show is counted as often, and read once.
        weight = np.bincount(shown[shown >= 0], minlength=len(segment.alignment)).astype(np.float64)
        used = np.flatnonzero(weight)
        weight = weight[used]
        cells = segment.alignment.tokens[used][:, segment.positions]
        length = len(segment.positions)
        # One histogram for all columns: column and token as one number.
        flat = (cells + np.arange(length) * NUM_TOKENS).ravel()
        counts = np.bincount(flat, np.repeat(weight, length), minlength=length * NUM_TOKENS)
        frequency[segment.start : segment.stop] = counts.reshape(length, NUM_TOKENS)
        frequency[segment.start : segment.stop, GAP] += (shown < 0).sum()
        values = _DELETION_VALUE[segment.alignment.deletions[used][:, segment.positions]]
        deletion[segment.start : segment.stop] = weight @ values
    return (frequency / len(rows.all)).astype(np.float32), (deletion / len(rows.all)).astype(np.float32)


def tile(rows: Rows, which: Interval, columns: Interval) -> dict[str, np.ndarray]:
    """One block of the sampled rows, padded where it reaches past the last row or token.

    Args:
        which: rows of the block, out of the padded sampled rows.
        columns: tokens of the block, out of the padded tokens of the crop.

    Returns:
        (rows, columns) each: ``msa`` int64 tokens (gap where padded), ``msa_mask``, ``has_deletion``,
        ``deletion_value`` and ``msa_paired`` float32.
    """
    shape = (which[1] - which[0], columns[1] - columns[0])
    tokens, deletions = np.full(shape, FEATURES["msa"].pad, dtype=np.int64), np.zeros(shape, dtype=np.uint8)
    mask, paired = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    real = rows.sampled[which[0] : which[1]]
    for chain, segment in enumerate(rows.segments):
        start, stop = max(segment.start, columns[0]), min(segment.stop, columns[1])
        if start >= stop:
            continue
        positions = segment.positions[start - segment.start : stop - segment.start]
        target = slice(start - columns[0], stop - columns[0])
        shown = np.flatnonzero(real[:, chain] >= 0)
        sequences = real[shown, chain]
        tokens[shown, target] = segment.alignment.tokens[sequences[:, None], positions]
        deletions[shown, target] = segment.alignment.deletions[sequences[:, None], positions]
        mask[: len(real), target] = 1
        paired[: len(real), target] = rows.paired[which[0] : which[1], chain, None]
    return {
        "msa": tokens,
        "msa_mask": mask,
        "has_deletion": (deletions > 0).astype(np.float32),
        "deletion_value": _DELETION_VALUE[deletions],
        "msa_paired": paired,
    }
