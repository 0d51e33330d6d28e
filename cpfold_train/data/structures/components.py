"""Residues and ligands as the Chemical Component Dictionary (CCD) describes them.

biotite ships the dictionary. It takes seconds to load and a few hundred MB, so only ``prepare`` reads it; a shard holds
what training needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from biotite.structure.info.ccd import get_ccd, get_from_ccd

from cpfold_train.vocabulary import AMINO_ACIDS, BOND_TYPES, DNA, NUCLEOTIDES, PROTEIN, RNA

_SYMBOLS = """
X H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE BR KR RB SR Y ZR NB MO TC
RU RH PD AG CD IN SN SB TE I XE CS BA LA CE PR ND PM SM EU GD TB DY HO ER TM YB LU HF TA W RE OS IR PT AU HG TL PB BI
PO AT RN FR RA AC TH PA U NP PU AM CM BK CF ES FM MD NO LR
"""
SYMBOLS = tuple(_SYMBOLS.split())
"""Of the elements, by atomic number; X stands for none."""

_ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS)}
_ORDERS = {"SING": "single", "DOUB": "double", "TRIP": "triple", "AROM": "aromatic"}
STANDARD = frozenset(AMINO_ACIDS + NUCLEOTIDES)
_UNKNOWN_AMINO_ACID = ("N", "CA", "C", "O", "CB")
"""Boltz-2's atoms of UNK; the CCD's has a C-gamma too."""


@dataclass(frozen=True)
class Component:
    """The Q heavy atoms of a residue or ligand.

    Attributes:
        names: (Q,) S4.
        elements: (Q,) uint8 atomic numbers.
        charges: (Q,) int8 formal charges.
        pos: (Q, 3) float32 ideal coordinates in Angstrom; the model's where the CCD has none, else zero.
        leaving: (Q,) bool, lost where the component is linked to another.
        bonds: (K, 2) int32 atoms, the lower first.
        bond_types: (K,) uint8 index into ``BOND_TYPES``.
    """

    names: np.ndarray
    elements: np.ndarray
    charges: np.ndarray
    pos: np.ndarray
    leaving: np.ndarray
    bonds: np.ndarray
    bond_types: np.ndarray


@cache
def component(name: str) -> Component | None:
    """Look a name up; None if the CCD does not know it, or only as a placeholder (UNX, UNL)."""
    atoms = get_from_ccd("chem_comp_atom", name)
    if atoms is None or name in ("UNX", "UNL"):
        return None
    names, symbols = (atoms[column].as_array(str) for column in ("atom_id", "type_symbol"))
    heavy = ~np.isin(symbols, ("H", "D"))
    if name == "UNK":
        heavy &= np.isin(names, _UNKNOWN_AMINO_ACID)
    kept = np.flatnonzero(heavy)
    if not len(kept):
        return None
    bonds, types = _bonds(name, names[kept].tolist())
    return Component(
        names=names[kept].astype("S4"),
        elements=np.array([atomic_number(symbol) for symbol in symbols[kept].tolist()], dtype=np.uint8),
        charges=_numbers(atoms, ["charge"])[kept, 0].astype(np.int8),
        pos=_positions(atoms)[kept],
        leaving=atoms["pdbx_leaving_atom_flag"].as_array(str)[kept] == "Y",
        bonds=bonds,
        bond_types=types,
    )


def atomic_number(symbol: str) -> int:
    """Of an element's symbol in any case; 0 if there is no such element."""
    return _ATOMIC_NUMBERS.get(symbol.upper(), 0)


def _numbers(atoms, columns: list[str]) -> np.ndarray:
    values = np.stack([atoms[column].as_array(str) for column in columns], axis=1)
    return np.where(np.isin(values, ("?", ".", "")), "nan" if len(columns) > 1 else "0", values).astype(np.float64)


def _positions(atoms) -> np.ndarray:
    ideal = _numbers(atoms, [f"pdbx_model_Cartn_{x}_ideal" for x in "xyz"])
    model = _numbers(atoms, [f"model_Cartn_{x}" for x in "xyz"])
    return np.nan_to_num(model if np.isnan(ideal).any() else ideal).astype(np.float32)


def _bonds(name: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    index = {atom: i for i, atom in enumerate(names)}
    listed = get_from_ccd("chem_comp_bond", name)
    found = []
    if listed is not None:
        columns = ("atom_id_1", "atom_id_2", "value_order", "pdbx_aromatic_flag")
        for first, second, order, aromatic in zip(*(listed[column].as_array(str).tolist() for column in columns)):
            if first in index and second in index:
                kind = "aromatic" if aromatic == "Y" else _ORDERS.get(order, "other")
                found.append((*sorted((index[first], index[second])), BOND_TYPES.index(kind)))
    table = np.array(sorted(found), dtype=np.int32).reshape(-1, 3)
    return table[:, :2], table[:, 2].astype(np.uint8)


@cache
def _column(name: str) -> dict[str, str]:
    components = get_ccd()["chem_comp"]
    return dict(zip(components["id"].as_array(str).tolist(), components[name].as_array(str).tolist()))


@cache
def parent(name: str) -> str | None:
    """The standard residue that a modified one is made from; itself for a standard one, None where there is none."""
    if name in STANDARD:
        return name
    found = _column("mon_nstd_parent_comp_id").get(name, "").split(",")[0].strip()
    return found if found in STANDARD else None


@cache
def polymer_type(name: str) -> int | None:
    """Molecule type that a residue is a link of; None for ligands."""
    kind = _column("type").get(name, "").upper()
    if "PEPTIDE LINKING" in kind or kind.startswith(("L-PEPTIDE", "D-PEPTIDE")):
        return PROTEIN
    if "DNA" in kind:
        return DNA
    return RNA if "RNA" in kind else None


@cache
def is_saccharide(name: str) -> bool:
    """Whether it is a sugar, of which glycans are made."""
    return "SACCHARIDE" in _column("type").get(name, "").upper()
