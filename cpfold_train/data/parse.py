"""Read a structure file (mmCIF, BinaryCIF or PDB) into a :class:`Structure`.

A polymer keeps its full sequence, unresolved residues included. Of several models the first is read, of several
alternative locations the one with the highest occupancy. Hydrogens, waters and non-polymers are left out and counted.
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import biotite.structure as struc
import biotite.structure.io.pdb as pdb
import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.align import align
from cpfold_train.data.residues import (
    CENTER_ATOM,
    DISTO_ATOM,
    DNA,
    MOL_TYPES,
    PROTEIN,
    RNA,
    polymer_type,
    token_of,
)
from cpfold_train.data.structure import FORMAT_VERSION, Structure
from cpfold_train.errors import DataError

SUFFIXES = (".cif", ".mmcif", ".bcif", ".pdb", ".ent")
_POLYMERS = {"polypeptide(L)": PROTEIN, "polydeoxyribonucleotide": DNA, "polyribonucleotide": RNA}
_SYMBOLS = """
X H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE BR KR RB SR Y ZR NB MO TC
RU RH PD AG CD IN SN SB TE I XE CS BA LA CE PR ND PM SM EU GD TB DY HO ER TM YB LU HF TA W RE OS IR PT AU HG TL PB BI
"""
_ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(_SYMBOLS.split())}


@dataclass
class Polymer:
    """A chain as the file gives it: ``atoms`` of residue ``place[i]`` of ``sequence``."""

    name: str
    auth_name: str
    mol_type: int
    sequence: list[str]
    atoms: struc.AtomArray
    place: np.ndarray


@dataclass
class Entry:
    """What a file holds: its polymers, its description, and what was left out (``Counter`` of residues by reason)."""

    polymers: list[Polymer]
    meta: dict[str, Any]
    left_out: Counter = field(default_factory=Counter)


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
            entry = _read_mmcif(pdbx.BinaryCIFFile.read(io.BytesIO(data)).block)
        elif suffix in (".cif", ".mmcif"):
            entry = _read_mmcif(pdbx.CIFFile.read(io.StringIO(data.decode())).block)
        else:
            entry = _read_pdb(data.decode())
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


def _heavy(atoms: struc.AtomArray) -> struc.AtomArray:
    """Without hydrogens, and with selenomethionine, a crystallographer's aid, turned back into methionine."""
    atoms = atoms[~np.isin(atoms.element, ("H", "D"))]
    selenium = (atoms.res_name == "MSE") & (atoms.atom_name == "SE")
    atoms.atom_name[selenium], atoms.element[selenium] = "SD", "S"
    atoms.res_name[atoms.res_name == "MSE"] = "MET"
    return atoms


def _count_left_out(atoms: struc.AtomArray, left_out: Counter) -> None:
    names = atoms.res_name[struc.get_residue_starts(atoms)] if atoms.array_length() else np.array([], dtype=str)
    water = np.isin(names, ("HOH", "DOD", "WAT"))
    left_out.update({"water": int(water.sum()), "non-polymer": int((~water).sum())})


def _read_mmcif(block: pdbx.CIFBlock) -> Entry:
    atoms = pdbx.get_structure(
        block,
        model=1,
        altloc="occupancy",
        use_author_fields=False,
        extra_fields=["b_factor", "label_entity_id", "auth_asym_id"],
    )
    atoms = _heavy(atoms)
    entry = Entry([], _mmcif_meta(block))
    key, sequences = _mmcif_sequences(block)
    in_polymer = np.isin(atoms.get_annotation(key), list(sequences)) & (atoms.res_id > 0)
    _count_left_out(atoms[~in_polymer], entry.left_out)
    atoms = atoms[in_polymer]
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        chain = atoms[atoms.chain_id == name]
        mol_type, numbers, sequence = sequences[str(chain.get_annotation(key)[0])]
        if mol_type is None:
            entry.left_out["other polymer"] += struc.get_residue_count(chain)
            continue
        place = np.searchsorted(numbers, chain.res_id).clip(max=len(numbers) - 1)
        # At a heterogeneous position the sequence lists the main residue first; atoms of the others are dropped.
        same = (np.array(sequence)[place] == chain.res_name) & (np.array(numbers)[place] == chain.res_id)
        if not same.all():
            entry.left_out["other residue at the position"] += len(np.unique(place[~same]))
        entry.polymers.append(Polymer(name, str(chain.auth_asym_id[0]), mol_type, sequence, chain[same], place[same]))
    return entry


def _mmcif_sequences(block: pdbx.CIFBlock) -> tuple[str, dict[str, tuple[int | None, list[int], list[str]]]]:
    """Molecule type (None where neither protein nor nucleic acid), residue numbers and names, by entity or by chain.

    Returns:
        The annotation of the atoms that the dictionary goes by, and the dictionary.
    """
    if "entity_poly_seq" in block and "entity_poly" in block:
        listing, columns, key = block["entity_poly_seq"], ("entity_id", "num", "mon_id"), "label_entity_id"
        poly = block["entity_poly"]
        kinds = dict(zip(poly["entity_id"].as_array(str).tolist(), poly["type"].as_array(str).tolist()))
    elif "pdbx_poly_seq_scheme" in block:  # assembly files list the sequence by chain only
        listing, columns, key = block["pdbx_poly_seq_scheme"], ("asym_id", "seq_id", "mon_id"), "chain_id"
        kinds = {}
    else:
        raise DataError("it lists no polymer sequence (neither entity_poly_seq nor pdbx_poly_seq_scheme)")
    residues: dict[str, dict[int, str]] = {}
    for owner, number, name in zip(*(listing[column].as_array(str).tolist() for column in columns)):
        residues.setdefault(owner, {}).setdefault(int(number), "MET" if name == "MSE" else name)
    sequences = {}
    for owner, by_number in residues.items():
        numbers = sorted(by_number)
        names = [by_number[number] for number in numbers]
        by_kind = owner in kinds and "hybrid" not in kinds[owner]
        sequences[owner] = (_POLYMERS.get(kinds[owner]) if by_kind else _majority(names), numbers, names)
    return key, sequences


def _majority(names: list[str]) -> int | None:
    """Molecule type of most residues."""
    kinds = Counter(polymer_type(name) for name in names)
    return kinds.most_common(1)[0][0] if kinds else None


def _mmcif_meta(block: pdbx.CIFBlock) -> dict[str, Any]:
    def first(category: str, column: str, of: Any = str) -> Any:
        try:
            values = block[category][column].as_array(str)
        except KeyError:
            return None
        return next((of(value) for value in values if value not in ("?", ".", "")), None)

    places = (("refine", "ls_d_res_high"), ("em_3d_reconstruction", "resolution"), ("reflns", "d_resolution_high"))
    resolutions = [first(category, column, float) for category, column in places]
    return {
        "title": first("struct", "title"),
        "method": first("exptl", "method"),
        "resolution": next((r for r in resolutions if r is not None), None),
        "release_date": first("pdbx_audit_revision_history", "revision_date"),
    }


def _read_pdb(text: str) -> Entry:
    file = pdb.PDBFile.read(io.StringIO(text))
    atoms = _heavy(file.get_structure(model=1, altloc="occupancy", extra_fields=["b_factor"]))
    entry = Entry([], _pdb_meta(text))
    seqres = _pdb_sequences(text)
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        chain = atoms[atoms.chain_id == name]
        starts = struc.get_residue_starts(chain, add_exclusive_stop=True)
        names = chain.res_name[starts[:-1]].tolist()
        sequence = seqres.get(name)
        if sequence is None:
            # Without SEQRES a single residue is a ligand or a free amino acid rather than a chain.
            linked = [i for i, residue in enumerate(names) if polymer_type(residue) is not None]
            linked = linked if len(linked) > 1 else []
            sequence = [names[i] for i in linked]
            places = dict(zip(linked, range(len(linked))))
        else:
            linked = [i for i, residue in enumerate(names) if residue in sequence]
            matched = align([names[i] for i in linked], sequence)
            places = {
                i: place for i, place in zip(linked, matched.tolist()) if place >= 0 and names[i] == sequence[place]
            }
        mol_type = _majority(sequence)
        residue = np.repeat(np.arange(len(names)), np.diff(starts))
        kept = np.isin(residue, list(places))
        _count_left_out(chain[~kept], entry.left_out)
        if places and mol_type is not None:
            place = np.array([places[i] for i in residue[kept].tolist()])
            entry.polymers.append(Polymer(name, name, mol_type, sequence, chain[kept], place))
    return entry


def _pdb_sequences(text: str) -> dict[str, list[str]]:
    sequences: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("SEQRES"):
            names = ["MET" if name == "MSE" else name for name in line[19:70].split()]
            sequences.setdefault(line[11], []).extend(names)
    return sequences


def _pdb_meta(text: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"title": None, "method": None, "resolution": None, "release_date": None}
    title = []
    for line in text.splitlines():
        if line.startswith("TITLE "):
            title.append(line[10:80].strip())
        elif line.startswith("EXPDTA") and meta["method"] is None:
            meta["method"] = line[10:79].split(";")[0].strip() or None
        elif line.startswith("REMARK   2 RESOLUTION."):
            value = line[22:].split()[0]
            meta["resolution"] = float(value) if value.replace(".", "").isdigit() else None
        elif line.startswith("REVDAT   1  "):
            day, month, year = line[13:22].split("-")
            months = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
            century = "19" if int(year) > 70 else "20"
            meta["release_date"] = f"{century}{year}-{months.index(month) + 1:02d}-{day}"
        elif line.startswith(("ATOM", "HETATM")):
            break
    meta["title"] = " ".join(title) or None
    return meta
