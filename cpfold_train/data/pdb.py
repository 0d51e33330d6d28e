"""Read PDB files."""

from __future__ import annotations

import io
from typing import Any

import biotite.structure as struc
import biotite.structure.io.pdb as biotite_pdb
import numpy as np

from cpfold_train.data.align import align
from cpfold_train.data.entry import Entry, Polymer, count_left_out, heavy, majority_type
from cpfold_train.data.residues import polymer_type


def read_pdb(text: str) -> Entry:
    """Polymers by chain letter; observed residues are aligned with SEQRES, or stand for it where there is none."""
    file = biotite_pdb.PDBFile.read(io.StringIO(text))
    atoms = heavy(file.get_structure(model=1, altloc="occupancy", extra_fields=["b_factor"]))
    entry = Entry([], _meta(text))
    seqres = _sequences(text)
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        chain = atoms[atoms.chain_id == name]
        starts = struc.get_residue_starts(chain, add_exclusive_stop=True)
        names, numbers = chain.res_name[starts[:-1]].tolist(), chain.res_id[starts[:-1]]
        sequence = seqres.get(name)
        if sequence is None:
            # Without SEQRES a single residue is a ligand or a free amino acid rather than a chain.
            linked = [i for i, residue in enumerate(names) if polymer_type(residue) is not None]
            linked = linked if len(linked) > 1 else []
            sequence = [names[i] for i in linked]
            places = dict(zip(linked, range(len(linked))))
        else:
            linked = [i for i, residue in enumerate(names) if residue in sequence]
            matched = _match([names[i] for i in linked], numbers[linked], sequence).tolist()
            places = {i: place for i, place in zip(linked, matched) if place >= 0 and names[i] == sequence[place]}
        mol_type = majority_type(sequence)
        residue = np.repeat(np.arange(len(names)), np.diff(starts))
        kept = np.isin(residue, list(places))
        count_left_out(chain[~kept], entry.left_out)
        if places and mol_type is not None:
            place = np.array([places[i] for i in residue[kept].tolist()])
            entry.polymers.append(Polymer(name, name, mol_type, sequence, chain[kept], place))
    return entry


def _match(names: list[str], numbers: np.ndarray, sequence: list[str]) -> np.ndarray:
    """Place of each observed residue in the sequence, -1 where it has none.

    Residue numbers that follow the sequence settle the ends of a gap, which an alignment can place in several ways.
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
