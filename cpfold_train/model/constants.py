"""Sizes of Boltz-2's vocabularies (``boltz/data/const.py``)."""

NUM_TOKENS = 33
"""Residue types: pad, gap, 20 amino acids, unknown, and the nucleotides with theirs."""

NUM_METHODS = 12
"""Experimental methods."""

NUM_MOLECULE_TYPES = 4
PROTEIN, DNA, RNA, NONPOLYMER = range(NUM_MOLECULE_TYPES)
"""Molecule types of chains."""

NUM_BOND_TYPES = 6
"""Kinds of bonds between tokens; 0 in ``type_bonds`` is no bond."""

NUM_ELEMENTS = 128
"""Atomic numbers, 0 for none."""

NUM_NAME_CHARACTERS = 4
"""Characters of an atom's name."""

NUM_NAME_CODES = 64
"""Codes of a character, 0 for none."""
