"""What the readers of the file formats hand over: the polymers of an entry."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import biotite.structure as struc
import numpy as np

from cpfold_train.data.residues import polymer_type


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


def heavy(atoms: struc.AtomArray) -> struc.AtomArray:
    """Without hydrogens, and with selenomethionine, a crystallographer's aid, turned back into methionine."""
    atoms = atoms[~np.isin(atoms.element, ("H", "D"))]
    selenium = (atoms.res_name == "MSE") & (atoms.atom_name == "SE")
    atoms.atom_name[selenium], atoms.element[selenium] = "SD", "S"
    atoms.res_name[atoms.res_name == "MSE"] = "MET"
    return atoms


def count_left_out(atoms: struc.AtomArray, left_out: Counter) -> None:
    """Add the residues of ``atoms`` to ``left_out``, as water or as non-polymer."""
    names = atoms.res_name[struc.get_residue_starts(atoms)] if atoms.array_length() else np.array([], dtype=str)
    water = np.isin(names, ("HOH", "DOD", "WAT"))
    left_out.update({"water": int(water.sum()), "non-polymer": int((~water).sum())})


def majority_type(names: list[str]) -> int | None:
    """Molecule type of most residues."""
    kinds = Counter(polymer_type(name) for name in names)
    return kinds.most_common(1)[0][0] if kinds else None
