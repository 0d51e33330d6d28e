"""Residues by their names and letters: their tokens and representative atoms, and the classes of experiments."""

from __future__ import annotations

import numpy as np

from cpfold_train.vocabulary import AMINO_ACIDS, DNA, GAP, NUCLEOTIDES, PROTEIN, TOKEN_IDS, UNKNOWN

_OF_PROTEIN = frozenset(AMINO_ACIDS)
_OF_NUCLEIC = frozenset(NUCLEOTIDES)

CENTER_ATOM = np.array(["", ""] + ["CA"] * len(AMINO_ACIDS) + ["C1'"] * len(NUCLEOTIDES), dtype="S4")
"""Atom that stands for a token's position, by token."""

DISTO_ATOM = np.array(
    ["", ""]
    + ["CA" if name == "GLY" else "CB" for name in AMINO_ACIDS]
    + [{"A": "C4", "G": "C4", "N": "C1'"}.get(name[-1], "C2") for name in NUCLEOTIDES],
    dtype="S4",
)
"""Atom whose distances the distogram predicts, by token: C-beta, C4 of purines, C2 of pyrimidines."""

THREE_LETTERS = dict(zip("ARNDCQEGHILKMFPSTWYV", AMINO_ACIDS))
_LETTERS = {name: letter for letter, name in THREE_LETTERS.items()}

METHODS = {
    "md": 0,
    "x-ray diffraction": 1,
    "electron microscopy": 2,
    "solution nmr": 3,
    "afdb": 5,
    "boltz-1": 6,
}
OTHER_METHOD = 4


def method_id(method: str | None) -> int:
    """Class of the experiment for ``method_feature``; an entry that does not say is taken for X-ray diffraction."""
    return METHODS["x-ray diffraction"] if not method else METHODS.get(method.lower(), OTHER_METHOD)


def letter_table(mol_type: int) -> np.ndarray:
    """(256,) int8: token of each upper-case letter of an alignment of such a molecule; ``-`` and ``.`` are gaps."""
    table = np.full(256, UNKNOWN[mol_type], dtype=np.int8)
    table[[ord("-"), ord(".")]] = GAP
    if mol_type == PROTEIN:
        names = THREE_LETTERS
    else:
        prefix, last = ("D", "DT") if mol_type == DNA else ("", "U")
        names = {"A": prefix + "A", "G": prefix + "G", "C": prefix + "C", "T": last, "U": last}
    for letter, name in names.items():
        table[ord(letter)] = TOKEN_IDS[name]
    return table


def token_of(residue: str, mol_type: int) -> tuple[int, bool]:
    """Token of a polymer's residue, and whether it is a modified one; those have the unknown token, as in Boltz-2."""
    standard = _OF_PROTEIN if mol_type == PROTEIN else _OF_NUCLEIC
    return (TOKEN_IDS[residue], False) if residue in standard else (UNKNOWN[mol_type], True)


def letter_of(residue: str | None, mol_type: int) -> str:
    """One-letter code of a standard residue, X (proteins) or N where it is unknown."""
    if mol_type == PROTEIN:
        return _LETTERS.get(residue, "X")
    return residue[-1] if residue in _OF_NUCLEIC else "N"
