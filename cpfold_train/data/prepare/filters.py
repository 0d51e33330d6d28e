"""Which chains and entries are fit for training (AlphaFold 3, supplement 2.5.4)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cpfold_train.data.features.contacts import clashing_chains
from cpfold_train.data.structures.edit import take_chains
from cpfold_train.data.structures.structure import Structure
from cpfold_train.vocabulary import DNA, MOL_TYPES, NONPOLYMER, PROTEIN, RNA, UNKNOWN

_AIDS = "SO4 GOL EDO PO4 ACT PEG DMS TRS PGE PG4 FMT EPE MPD MES CD IOD"
CRYSTAL_AIDS = frozenset(_AIDS.split())
"""Components that help crystals to grow and rarely belong to the molecule (AlphaFold 3, supplement, table 9)."""

MIN_RESOLVED = 4
"""Resolved residues below which a polymer chain is removed."""

MAX_CA_DISTANCE = 10.0
"""Angstrom between the C-alphas of neighbours in the sequence above which a protein chain is removed."""


@dataclass(frozen=True)
class Limits:
    """What an entry must keep to; None for no limit. Dates are ISO 8601, sizes are those left after removing chains."""

    before: str | None = None
    after: str | None = None
    max_resolution: float | None = None
    min_residues: int = 16
    max_residues: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    max_chains: int = 300
    max_unknown: float = 1.0
    keep_crystal_aids: bool = False
    exclude_ligands: tuple[str, ...] = ()


def fit_chains(structure: Structure, limits: Limits) -> tuple[Structure, Counter]:
    """The structure without the chains that are not fit, and how many were removed by reason.

    Clashes are looked for among the chains that the other rules leave.
    """
    removed: Counter = Counter()
    reasons = [_unfit(structure, asym_id, limits) for asym_id in range(len(structure.meta["chains"]))]
    structure = _without(structure, reasons, removed)
    reasons = [None] * len(structure.meta["chains"])
    for asym_id in clashing_chains(structure):
        reasons[asym_id] = "clashes with another chain"
    return _without(structure, reasons, removed), removed


def _without(structure: Structure, reasons: list[str | None], removed: Counter) -> Structure:
    removed.update(reason for reason in reasons if reason)
    return take_chains(structure, np.array([reason is None for reason in reasons], dtype=bool))


def _unfit(structure: Structure, asym_id: int, limits: Limits) -> str | None:
    tokens = np.flatnonzero(structure.asym_id == asym_id)
    mol_type = MOL_TYPES.index(structure.meta["chains"][asym_id]["type"])
    center, known = (values[tokens] for values in structure.center)
    if mol_type == NONPOLYMER:
        names = set(structure.comp_name[structure.component[tokens]].astype(str).tolist())
        crystal = (structure.meta["method"] or "").upper() == "X-RAY DIFFRACTION"
        if crystal and not limits.keep_crystal_aids and names <= CRYSTAL_AIDS:
            return "crystallisation aid"
        if names & set(limits.exclude_ligands):
            return "excluded ligand"
        return None if known.any() else "ligand without coordinates"
    if (structure.res_type[tokens] == UNKNOWN[mol_type]).all() and not structure.modified[tokens].any():
        return "only unknown residues"
    if known.sum() < MIN_RESOLVED:
        return f"fewer than {MIN_RESOLVED} resolved residues"
    steps = np.linalg.norm(np.diff(center, axis=0), axis=-1)[known[1:] & known[:-1]]
    if mol_type == PROTEIN and (steps > MAX_CA_DISTANCE).any():
        return f"neighbouring C-alphas more than {MAX_CA_DISTANCE:g} Å apart"
    return None


def unfit_entry(structure: Structure, limits: Limits) -> str | None:
    """Why the entry is to be dropped, None if it is not."""
    released, resolution = structure.meta["release_date"], structure.meta["resolution"]
    if (limits.before or limits.after) and not released:
        return "it has no release date"
    if limits.before and released >= limits.before:
        return f"released {released}, not before {limits.before}"
    if limits.after and released <= limits.after:
        return f"released {released}, not after {limits.after}"
    if limits.max_resolution is not None and (resolution or 0.0) > limits.max_resolution:
        return f"resolution {resolution:g} Å, worse than --max-resolution {limits.max_resolution:g}"
    residues, tokens = int(structure.polymer.sum()), len(structure)
    polymers = int((structure.chains["mol_type"] != NONPOLYMER).sum())
    for count, name, least, most in (
        (residues, "residues", limits.min_residues, limits.max_residues),
        (tokens, "tokens", limits.min_tokens, limits.max_tokens),
        (polymers, "chains", 0, limits.max_chains),
    ):
        if count < least:
            return f"{count} {name} are fewer than --min-{name} {least}"
        if most is not None and count > most:
            return f"{count} {name} are more than --max-{name} {most}"
    unknown = np.isin(structure.res_type, [UNKNOWN[kind] for kind in (PROTEIN, DNA, RNA)]) & ~structure.modified
    fraction = (unknown & structure.polymer).sum() / max(1, residues)
    if fraction > limits.max_unknown:
        return f"{fraction:.0%} of the residues are unknown, more than --max-unknown {limits.max_unknown:g}"
    if not (structure.center[1] & structure.polymer).any():
        return "no residue has coordinates"
    return None
