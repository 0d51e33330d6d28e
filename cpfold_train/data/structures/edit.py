"""Take chains out of a structure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.vocabulary import NONPOLYMER


def take_chains(structure: Structure, keep: np.ndarray) -> Structure:
    """The structure with some of its chains; chains, entities, atoms and components are renumbered.

    Bonds to what is left out go with it. Entities keep their order, and copies (``sym``) are counted from 0 again.

    Args:
        keep: (chains,) bool.
    """
    if keep.all():
        return structure
    token = np.flatnonzero(keep[structure.asym_id])
    atom = np.flatnonzero(keep[structure.asym_id[structure.atom_token]])
    bond = np.isin(structure.bond_atoms, atom).all(axis=1)
    used, component = np.unique(structure.component[token], return_inverse=True)
    start, stop = structure.comp_start[used], structure.comp_start[used + 1]
    entry = np.concatenate([np.arange(0), *map(np.arange, start, stop)])
    taken = replace(
        structure,
        meta={**structure.meta, "chains": _chains(structure.meta["chains"], keep)},
        res_type=structure.res_type[token],
        component=component.astype(np.int16),
        res_index=structure.res_index[token],
        asym_id=_numbers(keep)[structure.asym_id[token]].astype(np.int16),
        modified=structure.modified[token],
        atom_start=_starts(np.diff(structure.atom_start)[token]),
        center_atom=structure.center_atom[token],
        disto_atom=structure.disto_atom[token],
        ref_atom=np.searchsorted(entry, structure.ref_atom[atom]).astype(np.int32),
        resolved=structure.resolved[atom],
        coords=structure.coords[atom],
        b_factor=structure.b_factor[atom],
        bond_atoms=np.searchsorted(atom, structure.bond_atoms[bond]).astype(np.int32),
        bond_type=structure.bond_type[bond],
        comp_name=structure.comp_name[used],
        comp_start=_starts(stop - start),
        comp_atom_name=structure.comp_atom_name[entry],
        comp_element=structure.comp_element[entry],
        comp_charge=structure.comp_charge[entry],
        comp_pos=structure.comp_pos[entry],
    )
    taken.meta["counts"] = count(taken)
    return taken


def count(structure: Structure) -> dict[str, int]:
    """How many tokens, residues of polymers, resolved tokens, atoms, chains and entities there are."""
    polymers = int((structure.chains["mol_type"] != NONPOLYMER).sum())
    return {
        "tokens": len(structure),
        "residues": int(structure.polymer.sum()),
        "resolved": int(structure.center[1].sum()),
        "atoms": len(structure.resolved),
        "resolved_atoms": int(structure.resolved.sum()),
        "chains": polymers,
        "ligands": len(structure.meta["chains"]) - polymers,
        "entities": len(set(structure.chains["entity"].tolist())),
    }


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _numbers(keep: np.ndarray) -> np.ndarray:
    """New number of everything that is kept."""
    return np.cumsum(keep) - 1


def _chains(chains: list[dict], keep: np.ndarray) -> list[dict]:
    kept = [chain for chain, stays in zip(chains, keep) if stays]
    entities = {entity: number for number, entity in enumerate(sorted({chain["entity"] for chain in kept}))}
    copies: Counter = Counter()
    numbered = []
    for chain in kept:
        entity = entities[chain["entity"]]
        numbered.append({**chain, "entity": entity, "sym": copies[entity]})
        copies[entity] += 1
    return numbered
