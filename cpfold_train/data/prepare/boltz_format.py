"""Read entries in the processed format of the ``boltz`` package.

A data set is a folder with ``manifest.json``, ``records/ID.json``, ``structures/ID.npz`` and ``msa/MSA_ID.npz``, all of
them structured arrays. Boltz-2 lists links among the ``bonds``, Boltz-1 as ``connections``. The ``mols`` are pickles
and are not read: the names of residues and atoms suffice to find a component in the CCD.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import biotite.structure as struc
import numpy as np

from cpfold_train.data.alignments.a3m import COLUMN, file_key
from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.structures.components import component
from cpfold_train.data.structures.entry import Chain, Entry, Site, is_backbone
from cpfold_train.data.structures.parse import build
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError, in_one_line
from cpfold_train.vocabulary import NONPOLYMER


def read_boltz(path: Path) -> tuple[Structure, Counter]:
    """Read ``structures/ID.npz`` of either generation, without the chains that its mask leaves out.

    Returns:
        The structure, and how many residues were left out by reason.

    Raises:
        DataError: the file cannot be read or holds no polymer.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            entry = _entry(arrays, read_record(path))
    except DataError:
        raise
    except Exception as error:  # a broken file can fail anywhere inside zip, zlib and numpy
        raise DataError(f"{path.name} cannot be read: {in_one_line(error)}") from error
    if all(chain.mol_type == NONPOLYMER for chain in entry.chains):
        raise DataError(f"{path.name} holds no protein or nucleic acid chain")
    entry.meta.update(id=path.stem.lower(), source=path.name)
    return build(entry), entry.left_out


def read_record(path: Path) -> dict[str, Any]:
    """The record that belongs to ``structures/ID.npz``."""
    record = path.parent.parent / "records" / f"{path.stem}.json"
    if not record.exists():
        raise DataError(f"{path.name} has no record: {record} does not exist")
    return json.loads(record.read_text())


def read_boltz_alignment(path: Path, length: int) -> Alignment:
    """Read ``msa/MSA_ID.npz`` of an entity with ``length`` residues.

    Raises:
        DataError: it cannot be read, or its rows have another length.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, residues, deletions = (arrays[name] for name in ("sequences", "residues", "deletions"))
    except Exception as error:  # as above
        raise DataError(f"{path.name} cannot be read: {in_one_line(error)}") from error
    lengths = rows["res_end"] - rows["res_start"]
    if not len(rows) or (lengths != length).any():
        raise DataError(f"{path.name} does not belong to the sequence: it is not {length} residues wide")
    columns = rows["res_start"][:, None] + np.arange(length)
    counts = np.zeros((len(rows), length), dtype=np.uint8)
    for row, (start, stop) in enumerate(zip(rows["del_start"].tolist(), rows["del_end"].tolist())):
        listed = deletions[start:stop]
        counts[row, listed["res_idx"]] = np.clip(listed["deletion"], 0, 255)
    keys = np.array([file_key(str(key)) for key in rows["taxonomy"].tolist()], dtype=np.int64)
    keys[0] = file_key(None)
    kinds = dict.fromkeys(keys.tolist(), COLUMN)
    return Alignment(residues["res_type"][columns].astype(np.int8), counts, keys, kinds)


def _entry(arrays: Any, record: dict[str, Any]) -> Entry:
    atoms, residues, chains = arrays["atoms"], arrays["residues"], arrays["chains"]
    info = record["structure"]
    meta = {
        "title": None,
        "method": info.get("method"),
        "resolution": info.get("resolution") or None,
        "release_date": (info.get("released") or "")[:10] or None,
    }
    entry = Entry([], meta)
    names = _atom_names(atoms["name"])
    owner: dict[int, tuple[str, int]] = {}
    for number in np.flatnonzero(arrays["mask"]).tolist():
        chain = chains[number]
        own = range(chain["res_idx"], chain["res_idx"] + chain["res_num"])
        known = [r for r in own if chain["mol_type"] != NONPOLYMER or component(str(residues["name"][r])) is not None]
        if not known:
            entry.left_out["unknown ligand"] += len(own)
            continue
        entry.chains.append(_chain(str(chain["name"]), int(chain["mol_type"]), residues[known], atoms, names))
        owner.update({residue: (str(chain["name"]), position) for position, residue in enumerate(known)})
    links = arrays["bonds"] if "res_1" in arrays["bonds"].dtype.names else arrays["connections"]
    for link in links[links["res_1"] != links["res_2"]].tolist():
        link = dict(zip(links.dtype.names, link))
        if link["res_1"] in owner and link["res_2"] in owner:
            first, second = (Site(*owner[link[f"res_{end}"]], str(names[link[f"atom_{end}"]])) for end in (1, 2))
            if not is_backbone(first, second):
                entry.links.append((first, second))
    return entry


def _chain(name: str, mol_type: int, residues: np.ndarray, atoms: np.ndarray, names: np.ndarray) -> Chain:
    counts = residues["atom_num"]
    position = np.repeat(np.arange(len(residues)), counts)
    # Atoms of the residues in a row, each counted from its residue's first.
    within = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = residues["atom_idx"][position] + within
    there = atoms["is_present"][index] & residues["is_present"][position]
    index, position = index[there], position[there]
    found = struc.AtomArray(len(index))
    found.coord = atoms["coords"][index]
    found.atom_name = names[index]
    b_factor = atoms["bfactor"][index] if "bfactor" in atoms.dtype.names else np.zeros(len(index))
    found.set_annotation("b_factor", b_factor)
    return Chain(name, name, mol_type, residues["name"].astype(str).tolist(), found, position)


def _atom_names(stored: np.ndarray) -> np.ndarray:
    """Names as strings; Boltz-1 stores four numbers a name, each a character's code less 32."""
    if stored.dtype.kind == "U":
        return stored
    codes = np.where(stored != 0, stored + 32, 0).astype(np.uint8)
    return np.ascontiguousarray(codes).view("S4")[:, 0].astype(str)
