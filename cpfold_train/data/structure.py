"""One structure as arrays: what ``prepare`` writes and the training reads."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Structure:
    """L tokens (one a polymer residue, resolved or not, chain by chain) and their M heavy atoms in Angstrom.

    Attributes:
        meta: the sample's JSON: id, resolution, method and ``chains``, a list with entity, sym, type, length of each.
        res_type: (L,) int8 token, a modified residue's being its parent's.
        res_name: (L,) S5 name of the residue in the Chemical Component Dictionary.
        res_index: (L,) int32 place in the chain's full sequence, from 0.
        asym_id: (L,) int16 index into ``meta["chains"]``.
        modified: (L,) bool.
        atom_start: (L + 1,) int32; token i owns atoms ``atom_start[i]:atom_start[i + 1]``, none where unresolved.
        center_atom: (L,) int16 atom C-alpha or C1' counted from ``atom_start``, -1 where absent.
        disto_atom: (L,) int16 the same for the distogram's representative atom.
        atom_name: (M,) S4.
        element: (M,) uint8 atomic number.
        coords: (M, 3) float32.
        b_factor: (M,) float32 in square Angstrom.
    """

    meta: dict[str, Any]
    res_type: np.ndarray
    res_name: np.ndarray
    res_index: np.ndarray
    asym_id: np.ndarray
    modified: np.ndarray
    atom_start: np.ndarray
    center_atom: np.ndarray
    disto_atom: np.ndarray
    atom_name: np.ndarray
    element: np.ndarray
    coords: np.ndarray
    b_factor: np.ndarray

    def __len__(self) -> int:
        return len(self.res_type)

    @cached_property
    def chains(self) -> dict[str, np.ndarray]:
        """Per chain: ``entity``, ``sym`` and ``mol_type``, (chains,) int64 each."""
        from cpfold_train.data.residues import MOL_TYPES

        chains = self.meta["chains"]
        return {
            "entity": np.array([c["entity"] for c in chains], dtype=np.int64),
            "sym": np.array([c["sym"] for c in chains], dtype=np.int64),
            "mol_type": np.array([MOL_TYPES.index(c["type"]) for c in chains], dtype=np.int64),
        }

    @cached_property
    def resolved(self) -> np.ndarray:
        """(L,) bool: the center atom has coordinates."""
        return self.center_atom >= 0

    @cached_property
    def center(self) -> np.ndarray:
        """(L, 3) float32 coordinates of the center atoms, zero where unresolved."""
        return self._atom_coords(self.center_atom)

    def disto_center(self) -> tuple[np.ndarray, np.ndarray]:
        """(L, 3) float32 coordinates of the distogram atoms, zero where unresolved, and (L,) bool which are."""
        return self._atom_coords(self.disto_atom), self.disto_atom >= 0

    def _atom_coords(self, atom: np.ndarray) -> np.ndarray:
        known = atom >= 0
        coords = np.zeros((len(self), 3), dtype=np.float32)
        coords[known] = self.coords[self.atom_start[:-1][known] + atom[known]]
        return coords


_ARRAYS = [field.name for field in fields(Structure) if field.name != "meta"]


def pack_structure(structure: Structure) -> dict[str, bytes]:
    """The structure's members of a shard: ``json`` and ``structure.npz``."""
    return {
        "json": json.dumps(structure.meta, indent=1, sort_keys=True).encode(),
        "structure.npz": pack_arrays({name: getattr(structure, name) for name in _ARRAYS}),
    }


def unpack_structure(members: dict[str, bytes]) -> Structure:
    """The inverse of :func:`pack_structure`."""
    meta = json.loads(members["json"])
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"it has format version {meta['format_version']} and this program reads up to {FORMAT_VERSION}"
        )
    arrays = unpack_arrays(members["structure.npz"])
    return Structure(meta=meta, **{name: arrays[name] for name in _ARRAYS})


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Compressed npz. The same arrays give the same bytes: numpy dates every member 1980-01-01."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of :func:`pack_arrays`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)
