"""How many rows of the alignments of an entry pair between its chains, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment

MOST_PAIRS = 12
"""Pairs of alignments that are told one by one."""
REMEDY = (
    "write the organism into the headers (OX=9606 or TaxID=9606), or give csv files with a column key, or a3m files "
    "whose labels say paired and whose rows correspond"
)


def chain_label(chain: Mapping[str, Any]) -> str:
    """Name of a chain, and that of the file's author where it is another."""
    same = chain["name"] == chain["auth_name"]
    return chain["name"] if same else f"{chain['name']} ({chain['auth_name']})"


def told_pairing(chains: Sequence[Mapping[str, Any]], alignments: Mapping[int, Alignment]) -> list[str]:
    """Sentences on the rows of each two alignments that have a key in common, and on those of copies of a chain.

    Args:
        chains: of the entry, as in its JSON.
        alignments: by entity.

    Returns:
        None of a single chain; where no two alignments pair, the last sentence says what to do about it.
    """
    copies: dict[int, list[str]] = {}
    for chain in chains:
        if chain["entity"] in alignments and chain["type"] != "nonpolymer":
            copies.setdefault(chain["entity"], []).append(chain_label(chain))
    names = {entity: f"chain{'s' * (len(own) > 1)} {', '.join(own)}" for entity, own in copies.items()}
    told = []
    for entity, own in copies.items():
        if len(own) > 1:
            alignment = alignments[entity]
            keyed = alignment.keys[alignment.keys != UNPAIRED]
            count = f"{len(keyed):,} of {len(alignment):,} rows of {names[entity]} pair between these copies"
            told.append(count + _by(keyed, alignment))
    pairs = list(combinations(copies, 2))
    found = [_pair(names, alignments, *pair) for pair in pairs]
    told += [sentence for sentence, _ in found[:MOST_PAIRS]]
    if len(pairs) > MOST_PAIRS:
        told.append(f"and {sum(count > 0 for _, count in found[MOST_PAIRS:])} of {len(pairs) - MOST_PAIRS} more pairs")
    if pairs and not any(count for _, count in found):
        named = any((alignments[entity].keys != UNPAIRED).any() for entity in copies)
        why = "they have no key in common" if named else "their rows have no keys"
        told.append(f"the alignments of different chains cannot pair, for {why}: {REMEDY}")
    return told


def _pair(names: Mapping[int, str], alignments: Mapping[int, Alignment], first: int, second: int) -> tuple[str, int]:
    one, other = alignments[first], alignments[second]
    shared = np.setdiff1d(np.intersect1d(one.keys, other.keys), [UNPAIRED])
    if not len(shared):
        return f"no row of {names[first]} pairs with one of {names[second]}", 0
    counts = [f"{np.isin(x.keys, shared).sum():,} of {len(x):,} rows of" for x in (one, other)]
    return f"{counts[0]} {names[first]} pair with {counts[1]} {names[second]}{_by(shared, one, other)}", len(shared)


def _by(keys: np.ndarray, *alignments: Alignment) -> str:
    """What the keys are, where the files that they come from are known."""
    kinds = {alignment.key_kinds.get(key) for alignment in alignments for key in keys.tolist()} - {None}
    return f", by {' and '.join(sorted(kinds))}" if kinds else ""
