"""Read PDB files."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any

import biotite.structure as struc
import biotite.structure.io.pdb as biotite_pdb
import numpy as np

from cpfold_train.data.structures.components import component, is_saccharide, polymer_type
from cpfold_train.data.structures.entry import Chain, Entry, Site, heavy, is_backbone, ligand, majority_type
from cpfold_train.data.structures.pairwise import align
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import DNA, PROTEIN, RNA

_DATE = re.compile(r"(\d\d)-([A-Z]{3})-(\d\d)")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_UNKNOWN = {PROTEIN: "UNK", DNA: "DN", RNA: "N"}
_MOST_MISSING = 200
"""Residues that a gap in the numbers stands for; a larger one is more likely where two parts were joined."""
_BOND = 2.5
"""Angstrom; longer than any bond between two residues."""
_FORCE_FIELDS = {
    **dict.fromkeys(("HIE", "HID", "HIP", "HSD", "HSE", "HSP"), "HIS"),
    **dict.fromkeys(("CYX", "CYM"), "CYS"),
    **{"ASH": "ASP", "GLH": "GLU", "LYN": "LYS"},
}
"""Residues that force fields name by their protonation."""
_COVALENT = ("B", "BR", "C", "CL", "F", "I", "N", "O", "P", "S", "SE", "SI")
"""Elements whose bonds are covalent: LINK and CONECT list what coordinates a metal as well."""


def read_pdb(text: str, assembly: str | None = None) -> Entry:
    """Polymers by chain letter; observed residues are aligned with SEQRES, or stand for it where there is none.

    Every other residue is a chain of its own, named after its chain letter, residue and number; sugars that are linked
    to each other are one chain, as in mmCIF.

    Args:
        assembly: number of the biological assembly (REMARK 350) to build; None for the coordinates of the file.

    Raises:
        DataError: no such assembly.
    """
    atoms = _standard_names(heavy(_atoms(text, assembly)))
    atoms.set_annotation("row", np.arange(len(atoms)))
    entry = Entry([], _meta(text))
    seqres = _sequences(text)
    bonds = _bonds(text, atoms)
    ligands = []
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        chain = atoms[atoms.chain_id == name]
        starts = struc.get_residue_starts(chain, add_exclusive_stop=True)
        names, numbers = chain.res_name[starts[:-1]].tolist(), chain.res_id[starts[:-1]]
        sequence = seqres.get(name.split("-")[0])
        if sequence is None:
            # Without SEQRES a single residue is a ligand or a free amino acid rather than a chain.
            linked = [i for i, residue in enumerate(names) if polymer_type(residue) is not None]
            linked = linked if len(linked) > 1 else []
            sequence, found = _from_numbers(chain, starts, linked)
            positions = dict(zip(linked, found))
        else:
            linked = [i for i, residue in enumerate(names) if residue in sequence]
            matched = _match([names[i] for i in linked], numbers[linked], sequence).tolist()
            positions = {
                i: position for i, position in zip(linked, matched) if position >= 0 and names[i] == sequence[position]
            }
        mol_type = majority_type(sequence)
        residue = np.repeat(np.arange(len(names)), np.diff(starts))
        kept = np.isin(residue, list(positions))
        if positions and mol_type is not None:
            position = np.array([positions[i] for i in residue[kept].tolist()])
            entry.chains.append(Chain(name, name, mol_type, sequence, chain[kept], position))
        others = [i for i in range(len(names)) if i not in positions]
        for group in _glycans(chain, starts, others, bonds):
            part = chain[np.isin(residue, group)]
            own_name = f"{name}:{names[group[0]]}{part.res_id[0]}{part.ins_code[0]}"
            first = np.flatnonzero(np.diff(residue[np.isin(residue, group)], prepend=-1))
            ligands.append(ligand(own_name, name, part, first, entry.left_out))
    # As in mmCIF: glycans of several sugars come before other ligands.
    entry.chains += sorted(
        [found for found in ligands if found is not None], key=lambda found: len(found.sequence) == 1
    )
    entry.links = _links(bonds, entry.chains)
    return entry


def _atoms(text: str, assembly: str | None) -> struc.AtomArray:
    file = biotite_pdb.PDBFile.read(io.StringIO(text))
    common = {"model": 1, "altloc": "occupancy", "extra_fields": ["b_factor"], "include_bonds": True}
    if assembly is None:
        return file.get_structure(**common)
    known = re.findall(r"^REMARK 350 BIOMOLECULE: *(\d+)", text, flags=re.MULTILINE)
    if assembly not in known:
        raise DataError(f"it has no assembly {assembly}: there are {', '.join(known) or 'none'}")
    atoms = file.get_assembly(assembly_id=assembly, **common)
    names = [name if copy == 0 else f"{name}-{copy + 1}" for name, copy in zip(atoms.chain_id, atoms.sym_id)]
    atoms.set_annotation("chain_id", np.array(names))
    return atoms


def _standard_names(atoms: struc.AtomArray) -> struc.AtomArray:
    """Residues of force fields under their own names. The dictionary has other components of some of those names,
    which have other atoms."""
    starts = struc.get_residue_starts(atoms, add_exclusive_stop=True)
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        standard = _FORCE_FIELDS.get(str(atoms.res_name[first]))
        if standard and {*atoms.atom_name[first:end].tolist()} <= {*component(standard).names.astype(str).tolist()}:
            atoms.res_name[first:end] = standard
    return atoms


def _from_numbers(chain: struc.AtomArray, starts: np.ndarray, linked: list[int]) -> tuple[list[str], list[int]]:
    """The sequence of residues without SEQRES, and the position of each: numbers that are left out where the chain is
    broken are residues of an unknown kind."""
    names, numbers = (values[starts[linked]].tolist() for values in (chain.res_name, chain.res_id))
    unknown = _UNKNOWN.get(majority_type(names))
    ordered = all(a < b for a, b in pairwise(numbers)) and not any(chain.ins_code[starts[linked]])
    sequence, positions = [], []
    for number, i in enumerate(linked):
        missing = numbers[number] - numbers[number - 1] - 1 if number and ordered and unknown else 0
        if 0 < missing <= _MOST_MISSING and not _bonded(chain, starts, linked[number - 1], i):
            sequence += [unknown] * missing
        positions.append(len(sequence))
        sequence.append(names[number])
    return sequence, positions


def _bonded(chain: struc.AtomArray, starts: np.ndarray, first: int, second: int) -> bool:
    """Whether the backbone goes on from one residue to the other."""
    end, start = (chain[starts[i] : starts[i + 1]] for i in (first, second))
    end, start = end[np.isin(end.atom_name, ("C", "O3'"))], start[np.isin(start.atom_name, ("N", "P"))]
    return len(end) == len(start) == 1 and bool(struc.distance(end[0], start[0]) < _BOND)


def _link_records(text: str, atoms: struc.AtomArray) -> np.ndarray:
    """(K, 2) atoms of the LINK (Refmac: LINKR) records within one copy of the entry, in each copy of an assembly."""
    copies: dict[str, dict[tuple, int]] = {}
    columns = (atoms.chain_id, atoms.res_id, atoms.ins_code, atoms.atom_name, atoms.row)
    for chain, number, insertion, atom, row in zip(*(column.tolist() for column in columns)):
        letter, _, copy = chain.partition("-")
        copies.setdefault(copy, {})[letter, number, insertion, atom] = row
    listed = []
    for line in text.splitlines():
        if line.startswith("LINK") and line[59:65].strip() == line[66:72].strip():
            ends = [line[start : start + 15] for start in (12, 42)]
            names = [(end[9:10].strip(), end[10:14].strip(), end[14:15].strip(), end[:4].strip()) for end in ends]
            if all(number.lstrip("-").isdigit() for _, number, _, _ in names):
                listed.append([(chain, int(number), code, atom) for chain, number, code, atom in names])
    found = [
        [known[end] for end in ends] for known in copies.values() for ends in listed if all(e in known for e in ends)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _glycans(chain: struc.AtomArray, starts: np.ndarray, others: list[int], bonds: np.ndarray) -> list[list[int]]:
    """The residues ``others`` of a chain, sugars that (K, 2) ``bonds`` of atoms link to each other in one group."""
    group = {i: [i] for i in others}
    sugars = {i for i in others if is_saccharide(str(chain.res_name[starts[i]]))}
    if len(sugars) > 1:
        row = {int(r): i for i in sugars for r in chain.row[starts[i] : starts[i + 1]]}
        for first, second in bonds[np.isin(bonds, list(row)).all(axis=1)].tolist():
            one, other = group[row[first]], group[row[second]]
            if one is not other:
                joined = sorted(one + other)
                group.update(dict.fromkeys(joined, joined))
    return [members for i, members in group.items() if members[0] == i]


def _bonds(text: str, atoms: struc.AtomArray) -> np.ndarray:
    """(K, 2) atoms of the covalent bonds between residues that LINK and CONECT records list, without disulphides."""
    first, second = np.concatenate([_link_records(text, atoms), atoms.bonds.as_array()[:, :2]]).T
    residue = np.cumsum(np.isin(np.arange(len(atoms)), struc.get_residue_starts(atoms)))
    covalent = np.isin(atoms.element, _COVALENT)
    sulphur = atoms.atom_name == "SG"
    listed = (residue[first] != residue[second]) & covalent[first] & covalent[second]
    listed &= ~(sulphur[first] & sulphur[second])
    return np.stack([first[listed], second[listed]], axis=1)


def _links(bonds: np.ndarray, chains: list[Chain]) -> list[tuple[Site, Site]]:
    """The sites of (K, 2) bonds of atoms, without those that the sequence implies."""
    sites = {}
    for chain in chains:
        for i in np.flatnonzero(np.isin(chain.atoms.row, bonds)).tolist():
            sites[int(chain.atoms.row[i])] = Site(chain.name, int(chain.position[i]), str(chain.atoms.atom_name[i]))
    links = [(sites[i], sites[j]) for i, j in bonds.tolist() if i in sites and j in sites]
    return [link for link in links if not is_backbone(*link)]


def _match(names: list[str], numbers: np.ndarray, sequence: list[str]) -> np.ndarray:
    """Place of each observed residue in the sequence, -1 where it has none.

    Residue numbers that follow the sequence settle the ends of a gap, which an alignment can put in several ways.
    """
    if len(np.unique(numbers)) == len(numbers) and len(numbers):
        observed, full = np.array(names), np.array(sequence)
        for shift in range(-int(numbers.min()), len(sequence) - int(numbers.max())):
            if (full[numbers + shift] == observed).all():
                return numbers + shift
    return align(names, sequence)


def _sequences(text: str) -> dict[str, list[str]]:
    sequences: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("SEQRES"):
            names = ["MET" if name == "MSE" else name for name in line[19:70].split()]
            sequences.setdefault(line[11], []).extend(names)
    return sequences


def _meta(text: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"title": None, "method": None, "resolution": None, "release_date": None}
    title = []
    for line in text.splitlines():
        if line.startswith("TITLE "):
            title.append(line[10:80].strip())
        elif line.startswith("EXPDTA") and meta["method"] is None:
            meta["method"] = line[10:79].split(";")[0].strip() or None
        elif line.startswith("REMARK   2 RESOLUTION."):
            found = re.match(r" *(\d+\.?\d*)", line[22:])
            meta["resolution"] = float(found[1]) if found else None
        elif line.startswith("REVDAT   1  "):
            if date := _DATE.fullmatch(line[13:22]):
                day, month, year = date[1], date[2], int(date[3])
                century = 1900 if year > 70 else 2000
                if month in _MONTHS:
                    meta["release_date"] = f"{century + year}-{_MONTHS.index(month) + 1:02d}-{day}"
        elif line.startswith(("ATOM", "HETATM")):
            break
    meta["title"] = " ".join(title) or None
    return meta
