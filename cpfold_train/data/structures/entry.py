"""What the readers of the file formats hand over: the chains of an entry."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import biotite.structure as struc
import numpy as np

from cpfold_train.data.structures.components import component, polymer_type
from cpfold_train.vocabulary import NONPOLYMER

WATER = ("HOH", "DOD", "WAT")


@dataclass
class Chain:
    """A polymer, or a ligand of one or several residues, as the file gives it.

    Attributes:
        name: mmCIF's label.
        auth_name: the authors' name, which alignments go by.
        mol_type: molecule type.
        sequence: names of its residues, unresolved ones included.
        atoms: the resolved heavy atoms.
        position: (atoms,) index into ``sequence`` of each.
    """

    name: str
    auth_name: str
    mol_type: int
    sequence: list[str]
    atoms: struc.AtomArray
    position: np.ndarray


class Site(NamedTuple):
    """An atom: name of its chain, position of its residue, and its own name."""

    chain: str
    position: int
    atom: str


@dataclass
class Entry:
    """What a file holds: its chains, its description, the covalent links between residues that no sequence implies,
    and what was left out (``Counter`` of residues by reason)."""

    chains: list[Chain]
    meta: dict[str, Any]
    links: list[tuple[Site, Site]] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def heavy(atoms: struc.AtomArray) -> struc.AtomArray:
    """Without hydrogens, and with selenomethionine, a crystallographer's aid, turned back into methionine."""
    atoms = atoms[~np.isin(atoms.element, ("H", "D"))]
    selenium = (atoms.res_name == "MSE") & (atoms.atom_name == "SE")
    atoms.atom_name[selenium], atoms.element[selenium] = "SD", "S"
    atoms.res_name[atoms.res_name == "MSE"] = "MET"
    return atoms


def ligand(name: str, auth_name: str, atoms: struc.AtomArray, starts: np.ndarray, left_out: Counter) -> Chain | None:
    """A chain of the non-polymer residues that begin at ``starts``; None if there is none that the CCD knows.

    Waters and unknown ligands are counted in ``left_out``.
    """
    names = atoms.res_name[starts].tolist()
    kept = [i for i, residue in enumerate(names) if residue not in WATER and component(residue) is not None]
    water = sum(residue in WATER for residue in names)
    left_out.update({"water": water, "unknown ligand": len(names) - water - len(kept)})
    if not kept:
        return None
    residue = np.repeat(np.arange(len(starts)), np.diff([*starts, atoms.array_length()]))
    inside = np.isin(residue, kept)
    position = np.searchsorted(kept, residue[inside])
    return Chain(name, auth_name, NONPOLYMER, [names[i] for i in kept], atoms[inside], position)


def is_backbone(first: Site, second: Site) -> bool:
    """Whether a link is one that the sequence implies: between neighbours, C to N or O3' to P."""
    ends = {(first.position, first.atom), (second.position, second.atom)}
    lower = min(first.position, second.position)
    implied = ({(lower, "C"), (lower + 1, "N")}, {(lower, "O3'"), (lower + 1, "P")})
    return first.chain == second.chain and ends in implied


def majority_type(names: list[str]) -> int | None:
    """Molecule type of most residues."""
    kinds = Counter(polymer_type(name) for name in names)
    return kinds.most_common(1)[0][0] if kinds else None
