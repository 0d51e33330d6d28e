"""Read a structure file (mmCIF, BinaryCIF or PDB) into a :class:`Structure`.

A polymer keeps its full sequence, unresolved residues included. Of several models the first is read, of several
alternative locations the one with the highest occupancy. Hydrogens, waters and non-polymers are left out and counted.
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path

import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.entry import Entry, Polymer
from cpfold_train.data.mmcif import read_mmcif
from cpfold_train.data.pdb import read_pdb
from cpfold_train.data.residues import CENTER_ATOM, DISTO_ATOM, MOL_TYPES, token_of
from cpfold_train.data.structure import FORMAT_VERSION, Structure
from cpfold_train.errors import DataError

SUFFIXES = (".cif", ".mmcif", ".bcif", ".pdb", ".ent")
_SYMBOLS = """
X H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE BR KR RB SR Y ZR NB MO TC
RU RH PD AG CD IN SN SB TE I XE CS BA LA CE PR ND PM SM EU GD TB DY HO ER TM YB LU HF TA W RE OS IR PT AU HG TL PB BI
"""
_ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(_SYMBOLS.split())}


def entry_id(path: Path) -> str:
    """Name of the file without its suffixes, in lower case: the sample's key."""
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    return Path(name).stem.replace(".", "-").lower()


def read_structure(path: Path) -> tuple[Structure, Counter]:
    """Read one file.

    Returns:
        The structure, and how many residues were left out by reason.

    Raises:
        DataError: the file cannot be read or holds no polymer.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        if suffix == ".bcif":
            entry = read_mmcif(pdbx.BinaryCIFFile.read(io.BytesIO(data)).block)
        elif suffix in (".cif", ".mmcif"):
            entry = read_mmcif(pdbx.CIFFile.read(io.StringIO(data.decode())).block)
        else:
            entry = read_pdb(data.decode())
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    except Exception as error:  # a broken file can fail anywhere inside the parsers
        raise DataError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    if not entry.polymers:
        raise DataError(f"{path.name} holds no protein or nucleic acid chain")
    entry.meta.update(id=entry_id(path), source=path.name)
    return _build(entry), entry.left_out


def _build(entry: Entry) -> Structure:
    entities: dict[tuple, int] = {}
    copies: Counter = Counter()
    chains, parts = [], []
    for asym_id, polymer in enumerate(entry.polymers):
        entity = entities.setdefault((polymer.mol_type, *polymer.sequence), len(entities))
        arrays = _chain_arrays(polymer, asym_id)
        parts.append(arrays)
        chains.append(
            {
                "name": polymer.name,
                "auth_name": polymer.auth_name,
                "entity": entity,
                "sym": copies[entity],
                "type": MOL_TYPES[polymer.mol_type],
                "length": len(polymer.sequence),
                "observed": int((arrays["atom_count"] > 0).sum()),
            }
        )
        copies[entity] += 1
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    atom_start = np.concatenate([[0], np.cumsum(columns.pop("atom_count"))]).astype(np.int32)
    meta = {"format_version": FORMAT_VERSION, **entry.meta, "chains": chains}
    meta["counts"] = {
        "tokens": len(columns["res_type"]),
        "resolved": int((columns["center_atom"] >= 0).sum()),
        "atoms": int(atom_start[-1]),
        "chains": len(chains),
        "entities": len(entities),
    }
    return Structure(meta=meta, atom_start=atom_start, **columns)


def _chain_arrays(polymer: Polymer, asym_id: int) -> dict[str, np.ndarray]:
    length = len(polymer.sequence)
    tokens = [token_of(name, polymer.mol_type) for name in polymer.sequence]
    res_type = np.array([token for token, _ in tokens], dtype=np.int8)
    order = np.argsort(polymer.place, kind="stable")
    atoms, place = polymer.atoms[order], polymer.place[order]
    count = np.bincount(place, minlength=length)
    atom_name = atoms.atom_name.astype("S4")
    within = np.arange(len(place)) - (np.cumsum(count) - count)[place]
    return {
        "res_type": res_type,
        "res_name": np.array(polymer.sequence, dtype="S5"),
        "res_index": np.arange(length, dtype=np.int32),
        "asym_id": np.full(length, asym_id, dtype=np.int16),
        "modified": np.array([modified for _, modified in tokens], dtype=bool),
        "atom_count": count,
        "center_atom": _find(atom_name, CENTER_ATOM[res_type], place, within),
        "disto_atom": _find(atom_name, DISTO_ATOM[res_type], place, within),
        "atom_name": atom_name,
        "element": np.array([_ATOMIC_NUMBERS.get(e.upper(), 0) for e in atoms.element.tolist()], dtype=np.uint8),
        "coords": atoms.coord.astype(np.float32),
        "b_factor": atoms.b_factor.astype(np.float32),
    }


def _find(atom_name: np.ndarray, wanted: np.ndarray, place: np.ndarray, within: np.ndarray) -> np.ndarray:
    """(length,) int16: number within its residue of the atom each residue wants, -1 where it is not there."""
    found = np.full(len(wanted), -1, dtype=np.int16)
    hit = atom_name == wanted[place]
    found[place[hit]] = within[hit]
    return found
