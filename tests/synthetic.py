"""Structures made of random walks, for tests that need no chemistry."""

from __future__ import annotations

import numpy as np

from cpfold_train.data.structures.structure import FORMAT_VERSION, Structure
from cpfold_train.vocabulary import MOL_TYPES, NONPOLYMER, UNKNOWN


def make_structure(lengths, types, seed=0, unresolved=0.1, atoms=(4, 9), spread=15.0, interfaces=()):
    """Chains of random walks that overlap.

    Args:
        lengths: of each chain: residues of a polymer, or atoms of a ligand, which is one residue.
        types: ``protein``, ``dna``, ``rna`` or ``nonpolymer`` of each.
        unresolved: fraction of tokens without coordinates.
        atoms: fewest and most atoms of a residue.
        spread: Angstrom, how far apart the chains begin.
    """
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mol_type = np.repeat([MOL_TYPES.index(kind) for kind in types], lengths)
    asym_id = np.repeat(np.arange(len(lengths)), lengths).astype(np.int16)
    ligand = mol_type == NONPOLYMER
    res_index = np.concatenate([np.arange(n) for n in lengths]) * ~ligand
    size = np.where(ligand, 1, rng.integers(*atoms, total))
    start = np.concatenate([[0], np.cumsum(size)]).astype(np.int32)
    walks = [rng.normal(0, spread, 3) + rng.normal(0, 2.2, (n, 3)).cumsum(0) for n in lengths]
    center = np.concatenate(walks)
    token = np.repeat(np.arange(total), size)
    resolved = (rng.random(total) >= unresolved)[token]
    within = np.arange(len(token)) - start[token]
    coords = np.where(resolved[:, None], center[token] + within[:, None] * 0.7, 0).astype(np.float32)
    chains = [
        {"name": chr(65 + i), "auth_name": chr(65 + i), "entity": i, "sym": 0, "type": kind, "cluster": f"{kind}:{i}"}
        | {"length": 1 if kind == "nonpolymer" else n, "observed": 1}
        for i, (n, kind) in enumerate(zip(lengths, types))
    ]
    most = int(size.max())
    meta = {"format_version": FORMAT_VERSION, "id": f"made{seed}", "method": None, "resolution": None}
    meta |= {"title": None, "release_date": None, "source": "made", "msa_depth": {}, "chains": chains}
    meta |= {"interfaces": [list(pair) for pair in interfaces], "counts": {"tokens": total, "atoms": len(token)}}
    return Structure(
        meta=meta,
        res_type=np.array([UNKNOWN[kind] for kind in mol_type], dtype=np.int8),
        component=np.zeros(total, dtype=np.int16),
        res_index=res_index.astype(np.int32),
        asym_id=asym_id,
        modified=np.zeros(total, dtype=bool),
        atom_start=start,
        center_atom=np.zeros(total, dtype=np.int16),
        disto_atom=np.zeros(total, dtype=np.int16),
        ref_atom=within.astype(np.int32),
        resolved=resolved,
        coords=coords,
        b_factor=np.zeros(len(token), dtype=np.float32),
        bond_atoms=np.zeros((0, 2), dtype=np.int32),
        bond_type=np.zeros(0, dtype=np.uint8),
        comp_name=np.array(["UNK"], dtype="S5"),
        comp_start=np.array([0, most], dtype=np.int32),
        comp_atom_name=np.array([f"C{i}" for i in range(most)], dtype="S4"),
        comp_element=np.full(most, 6, dtype=np.uint8),
        comp_charge=np.zeros(most, dtype=np.int8),
        comp_pos=rng.normal(size=(most, 3)).astype(np.float32),
    )
