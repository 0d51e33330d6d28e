"""The alignment of one entity as arrays, and how a shard holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNPAIRED = -1


@dataclass(frozen=True)
class Alignment:
    """D rows over the L residues of an entity; row 0 is the entity itself.

    Attributes:
        tokens: (D, L) int8.
        deletions: (D, L) uint8 inserted residues before each column, 255 standing for more.
        keys: (D,) int64; rows of different chains with the same key belong to one organism. -1: unknown.
    """

    tokens: np.ndarray
    deletions: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> Alignment:
        return Alignment(self.tokens[rows], self.deletions[rows], self.keys[rows])


def pack_alignments(alignments: dict[int, Alignment]) -> dict[str, np.ndarray]:
    """Arrays ``tokens_E``, ``deletions_E`` and ``keys_E`` of each entity E."""
    return {
        f"{field}_{entity}": getattr(alignment, field)
        for entity, alignment in sorted(alignments.items())
        for field in ("tokens", "deletions", "keys")
    }


def unpack_alignments(arrays: dict[str, np.ndarray]) -> dict[int, Alignment]:
    """The inverse of :func:`pack_alignments`."""
    entities = sorted(int(name.removeprefix("tokens_")) for name in arrays if name.startswith("tokens_"))
    return {e: Alignment(*(arrays[f"{field}_{e}"] for field in ("tokens", "deletions", "keys"))) for e in entities}
