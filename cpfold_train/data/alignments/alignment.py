"""The alignment of one entity as arrays, and how a shard holds it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

UNPAIRED = -1
_PACKED = ("tokens", "deletions", "keys")


@dataclass(frozen=True)
class Alignment:
    """D rows over the L residues of an entity; row 0 is the entity itself.

    Attributes:
        tokens: (D, L) int8.
        deletions: (D, L) uint8 inserted residues before each column, 255 standing for more.
        keys: (D,) int64; rows of different chains with the same key belong to one organism. -1: unknown.
        key_kinds: what each key is made from, as ``TaxID=``, where the alignment was just read from a file.
    """

    tokens: np.ndarray
    deletions: np.ndarray
    keys: np.ndarray
    key_kinds: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> Alignment:
        return replace(self, tokens=self.tokens[rows], deletions=self.deletions[rows], keys=self.keys[rows])


def pack_alignments(alignments: dict[int, Alignment]) -> dict[str, np.ndarray]:
    """Arrays ``tokens_E``, ``deletions_E`` and ``keys_E`` of each entity E."""
    return {
        f"{name}_{entity}": getattr(alignment, name)
        for entity, alignment in sorted(alignments.items())
        for name in _PACKED
    }


def unpack_alignments(arrays: dict[str, np.ndarray]) -> dict[int, Alignment]:
    """The inverse of :func:`pack_alignments`."""
    entities = sorted(int(name.removeprefix("tokens_")) for name in arrays if name.startswith("tokens_"))
    return {e: Alignment(*(arrays[f"{name}_{e}"] for name in _PACKED)) for e in entities}
