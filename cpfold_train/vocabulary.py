"""The vocabularies of Boltz-2, numbered as it numbers them (``boltz/data/const.py``), and their sizes."""

from __future__ import annotations

MOL_TYPES = ("protein", "dna", "rna", "nonpolymer")
"""Molecule types of chains."""
NUM_MOLECULE_TYPES = len(MOL_TYPES)
PROTEIN, DNA, RNA, NONPOLYMER = range(NUM_MOLECULE_TYPES)

AMINO_ACIDS = tuple(
    [
        "ALA",
        "ARG",
        "ASN",
        "ASP",
        "CYS",
        "GLN",
        "GLU",
        "GLY",
        "HIS",
        "ILE",
        "LEU",
        "LYS",
        "MET",
        "PHE",
        "PRO",
        "SER",
        "THR",
        "TRP",
        "TYR",
        "VAL",
        "UNK",
    ]
)
NUCLEOTIDES = ("A", "G", "C", "U", "N", "DA", "DG", "DC", "DT", "DN")
TOKENS = ("<pad>", "-", *AMINO_ACIDS, *NUCLEOTIDES)
"""Residue tokens: pad, gap, 20 amino acids, unknown, and the nucleotides with theirs."""
NUM_TOKENS = len(TOKENS)
TOKEN_IDS = {name: i for i, name in enumerate(TOKENS)}
GAP = TOKEN_IDS["-"]
UNKNOWN = {PROTEIN: TOKEN_IDS["UNK"], DNA: TOKEN_IDS["DN"], RNA: TOKEN_IDS["N"], NONPOLYMER: TOKEN_IDS["UNK"]}
"""By molecule type, the token of a residue that is no standard one."""

BOND_TYPES = ("other", "single", "double", "triple", "aromatic", "covalent")
"""``covalent`` are those that an entry lists between residues. ``type_bonds`` holds one more than the index, and 0 for
no bond."""
NUM_BOND_TYPES = len(BOND_TYPES)

NUM_METHODS = 12
"""Classes of experimental methods."""

NUM_ELEMENTS = 128
"""Atomic numbers, 0 for none."""

NUM_NAME_CHARACTERS = 4
"""Characters of an atom's name."""

NUM_NAME_CODES = 64
"""Codes of a character, 0 for none."""

FEATURE_SETS = BOLTZ2, CORRECTED = "boltz2", "corrected"
"""How features are made where the ``boltz`` package (2.2) makes them in a way that looks unintended: as the package,
whose weights know nothing else, or as they are meant. ``docs/data.md`` has the list."""
FEATURES_TOLD = {
    BOLTZ2: "boltz2, as the boltz package makes them, which Boltz-2's weights are trained with",
    CORRECTED: "corrected, where the boltz package makes them otherwise (docs/data.md)",
}
