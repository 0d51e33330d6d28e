"""One structure as arrays: what ``prepare`` writes and the training reads."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from cpfold_train.errors import DataError
from cpfold_train.vocabulary import MOL_TYPES, NONPOLYMER

FORMAT_VERSION = 2
MAX_CHAINS = 2**15 - 1
"""Of a sample: ``asym_id`` and the index's columns are int16, and the number after the last chain must be one too."""


@dataclass(frozen=True)
class Structure:
    """L tokens, their M heavy atoms in Angstrom, resolved or not, and the C kinds of residue that they belong to.

    A residue of a polymer, modified or not, is one token, an atom of anything else one each. Chain by chain; a polymer
    has all residues of its sequence, and a residue all heavy atoms that the Chemical Component Dictionary (CCD) lists.

    Attributes:
        meta: the sample's JSON: id, resolution, method and ``chains``, a list with entity, sym, type, length of each.
        res_type: (L,) int8 token; a modified residue has the unknown one of its kind of polymer, as have ligand atoms
            that of proteins.
        component: (L,) int16 kind of residue.
        res_index: (L,) int32 position of the residue in its chain's full sequence, from 0.
        asym_id: (L,) int16 index into ``meta["chains"]``.
        modified: (L,) bool, a residue of a polymer that is not a standard one.
        atom_start: (L + 1,) int32; token i owns atoms ``atom_start[i]:atom_start[i + 1]``.
        center_atom: (L,) int16 atom that stands for the token's position (C-alpha, C1', a ligand's atom itself),
            counted from ``atom_start``; -1 if the residue has no such atom.
        disto_atom: (L,) int16 the same for the distogram's representative atom.
        ref_atom: (M,) int32 which atom of the components it is.
        resolved: (M,) bool.
        coords: (M, 3) float32, zero where unresolved.
        b_factor: (M,) float32 in square Angstrom, zero where unresolved.
        bond_atoms: (K, 2) int32 atoms, the lower first, of the bonds within ligands and modified residues, and of those
            between residues that the sequence does not imply.
        bond_type: (K,) uint8 index into ``residues.BOND_TYPES``.
        comp_name: (C,) S5 name in the CCD.
        comp_start: (C + 1,) int32; component c owns entries ``comp_start[c]:comp_start[c + 1]`` of the next four.
        comp_atom_name: (Q,) S4.
        comp_element: (Q,) uint8 atomic number.
        comp_charge: (Q,) int8 formal charge.
        comp_pos: (Q, 3) float32 reference conformer.
    """

    meta: dict[str, Any]
    res_type: np.ndarray
    component: np.ndarray
    res_index: np.ndarray
    asym_id: np.ndarray
    modified: np.ndarray
    atom_start: np.ndarray
    center_atom: np.ndarray
    disto_atom: np.ndarray
    ref_atom: np.ndarray
    resolved: np.ndarray
    coords: np.ndarray
    b_factor: np.ndarray
    bond_atoms: np.ndarray
    bond_type: np.ndarray
    comp_name: np.ndarray
    comp_start: np.ndarray
    comp_atom_name: np.ndarray
    comp_element: np.ndarray
    comp_charge: np.ndarray
    comp_pos: np.ndarray

    def __len__(self) -> int:
        return len(self.res_type)

    @cached_property
    def chains(self) -> dict[str, np.ndarray]:
        """Per chain: ``entity``, ``sym`` and ``mol_type``, (chains,) int64 each."""
        chains = self.meta["chains"]
        return {
            "entity": np.array([c["entity"] for c in chains], dtype=np.int64),
            "sym": np.array([c["sym"] for c in chains], dtype=np.int64),
            "mol_type": np.array([MOL_TYPES.index(c["type"]) for c in chains], dtype=np.int64),
        }

    @cached_property
    def polymer(self) -> np.ndarray:
        """(L,) bool: the token is a residue of a polymer."""
        return self.chains["mol_type"][self.asym_id] != NONPOLYMER

    @cached_property
    def atom_token(self) -> np.ndarray:
        """(M,) int64 token of each atom."""
        return np.repeat(np.arange(len(self)), np.diff(self.atom_start))

    @cached_property
    def center(self) -> tuple[np.ndarray, np.ndarray]:
        """(L, 3) float32 coordinates of the center atoms, zero where unresolved, and (L,) bool which are resolved."""
        return self._coords_of(self.center_atom)

    @cached_property
    def disto_center(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for the distogram's atoms."""
        return self._coords_of(self.disto_atom)

    def _coords_of(self, atom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates (L, 3) of one atom of each token, counted from ``atom_start``, and whether it is resolved."""
        # The last token may have no atom, and then its start is past the end.
        index = (self.atom_start[:-1] + np.maximum(atom, 0)).clip(max=max(0, len(self.resolved) - 1))
        known = (atom >= 0) & self.resolved[index]
        return np.where(known[:, None], self.coords[index], np.float32(0)), known


ARRAYS = [field.name for field in fields(Structure) if field.name != "meta"]


def pack_structure(structure: Structure) -> dict[str, bytes]:
    """The structure's members of a shard: ``json`` and ``structure.npz``."""
    return {
        "json": json.dumps(structure.meta, indent=1, sort_keys=True).encode(),
        "structure.npz": pack_arrays({name: getattr(structure, name) for name in ARRAYS}),
    }


def check_version(meta: dict[str, Any]) -> dict[str, Any]:
    """A sample's JSON, if this program reads its format.

    Raises:
        DataError: it has another version.
    """
    if meta["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"it has format version {meta['format_version']} and this program reads {FORMAT_VERSION}: "
            "make the shards again with python -m cpfold_train prepare"
        )
    return meta


def unpack_structure(members: dict[str, bytes]) -> Structure:
    """The inverse of :func:`pack_structure`.

    Raises:
        DataError: the sample has another format version.
    """
    meta = check_version(json.loads(members["json"]))
    arrays = unpack_arrays(members["structure.npz"])
    return Structure(meta=meta, **{name: arrays[name] for name in ARRAYS})


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Compressed npz. The same arrays give the same bytes: numpy dates every member 1980-01-01."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of :func:`pack_arrays`.

    Unlike ``np.load``, this believes no header: an array is as large as its bytes, so damage cannot ask for memory.

    Raises:
        ValueError, zipfile.BadZipFile, zlib.error and others: the bytes are damaged.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        return {name.removesuffix(".npy"): _unpack_array(members.read(name)) for name in members.namelist()}


def _unpack_array(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array has version {version} of the npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()
