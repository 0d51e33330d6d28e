"""Read mmCIF and BinaryCIF."""

from __future__ import annotations

from typing import Any

import biotite.structure as struc
import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.structures.entry import Chain, Entry, Site, heavy, is_backbone, ligand, majority_type
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import DNA, PROTEIN, RNA

_POLYMERS = {"polypeptide(L)": PROTEIN, "polydeoxyribonucleotide": DNA, "polyribonucleotide": RNA}


def read_mmcif(block: pdbx.CIFBlock, assembly: str | None = None) -> Entry:
    """Chains by label (not author) chain and residue numbers, sequences as deposited.

    Args:
        assembly: id of the biological assembly to build; None for the deposited coordinates. A copy of chain A is
            called A-2, A-3, ...

    Raises:
        DataError: no such assembly, or no sequence.
    """
    entry = Entry([], _meta(block))
    atoms = heavy(_atoms(block, assembly))
    key, sequences = _sequences(block)
    owner = atoms.get_annotation(key)
    if key == "chain_id":
        owner = np.array([name.split("-")[0] for name in owner.tolist()])
    in_polymer = np.isin(owner, list(sequences)) & (atoms.res_id > 0)
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        here = np.flatnonzero(atoms.chain_id == name)
        chain, auth_name = atoms[here], str(atoms.auth_asym_id[here[0]])
        if not in_polymer[here].any():
            found = ligand(name, auth_name, chain, _residue_starts(chain), entry.left_out)
            entry.chains += [] if found is None else [found]
            continue
        chain = chain[in_polymer[here]]
        mol_type, numbers, sequence = sequences[str(owner[here[0]])]
        if mol_type is None:
            entry.left_out["other polymer"] += struc.get_residue_count(chain)
            continue
        position = np.searchsorted(numbers, chain.res_id).clip(max=len(numbers) - 1)
        # At a heterogeneous position the sequence lists the main residue first; atoms of the others are dropped.
        same = (np.array(sequence)[position] == chain.res_name) & (np.array(numbers)[position] == chain.res_id)
        if not same.all():
            entry.left_out["other residue at the position"] += len(np.unique(position[~same]))
        entry.chains.append(Chain(name, auth_name, mol_type, sequence, chain[same], position[same]))
    entry.links = _links(block, entry.chains)
    return entry


def _atoms(block: pdbx.CIFBlock, assembly: str | None) -> struc.AtomArray:
    common = {
        "model": 1,
        "altloc": "occupancy",
        "use_author_fields": False,
        "extra_fields": ["b_factor", "label_entity_id", "auth_asym_id", "auth_seq_id"],
    }
    if assembly is None:
        return pdbx.get_structure(block, **common)
    try:
        known = list(pdbx.list_assemblies(block))
    except KeyError:
        known = []
    if assembly not in known:
        raise DataError(f"it has no assembly {assembly}: there are {', '.join(known) or 'none'}")
    atoms = pdbx.get_assembly(block, assembly_id=assembly, **common)
    names = [name if copy == 0 else f"{name}-{copy + 1}" for name, copy in zip(atoms.chain_id, atoms.sym_id)]
    atoms.set_annotation("chain_id", np.array(names))
    return atoms


def _residue_starts(atoms: struc.AtomArray) -> np.ndarray:
    """First atom of each residue of a non-polymer, which has no label residue numbers."""
    changes = [column[1:] != column[:-1] for column in (atoms.auth_seq_id, atoms.ins_code, atoms.res_name)]
    return np.concatenate([[0], 1 + np.flatnonzero(np.any(changes, axis=0))])


def _links(block: pdbx.CIFBlock, chains: list[Chain]) -> list[tuple[Site, Site]]:
    """The covalent links of ``struct_conn`` within the entry, without those that the sequence implies."""
    if "struct_conn" not in block:
        return []
    table = block["struct_conn"]

    def column(name: str) -> list[str]:
        return table[name].as_array(str).tolist() if name in table else ["?"] * table.row_count

    ends = []
    for end in ("1", "2"):
        names = (f"ptnr{end}_label_asym_id", f"ptnr{end}_auth_seq_id", f"pdbx_ptnr{end}_PDB_ins_code")
        ends.append(list(zip(*map(column, (*names, f"ptnr{end}_label_atom_id")))))
    same_copy = [a == b for a, b in zip(column("ptnr1_symmetry"), column("ptnr2_symmetry"))]
    listed = [pair for kind, same, *pair in zip(column("conn_type_id"), same_copy, *ends) if kind == "covale" and same]
    wanted = {end[0] for pair in listed for end in pair}
    sites: dict[str, dict[tuple, Site]] = {}
    for chain in chains:
        label, _, copy = chain.name.partition("-")
        if label in wanted:
            known = sites.setdefault(copy, {})
            atoms = chain.atoms
            columns = (atoms.auth_seq_id, atoms.ins_code, atoms.atom_name, chain.position)
            for number, insertion, atom, position in zip(*(column.tolist() for column in columns)):
                known[label, str(number), insertion, atom] = Site(chain.name, position, atom)
    links = []
    for known in sites.values():
        for pair in listed:
            keys = [(chain, number, "" if code in "?." else code, atom) for chain, number, code, atom in pair]
            if all(key in known for key in keys):
                first, second = (known[key] for key in keys)
                if not is_backbone(first, second):
                    links.append((first, second))
    return links


def _sequences(block: pdbx.CIFBlock) -> tuple[str, dict[str, tuple[int | None, list[int], list[str]]]]:
    """Molecule type (None where neither protein nor nucleic acid), residue numbers and names, by entity or by chain.

    Returns:
        The annotation of the atoms that the dictionary goes by, and the dictionary.
    """
    if "entity_poly_seq" in block and "entity_poly" in block:
        listing, columns, key = block["entity_poly_seq"], ("entity_id", "num", "mon_id"), "label_entity_id"
        poly = block["entity_poly"]
        kinds = dict(zip(poly["entity_id"].as_array(str).tolist(), poly["type"].as_array(str).tolist()))
    elif "pdbx_poly_seq_scheme" in block:  # assembly files list the sequence by chain only
        listing, columns, key = block["pdbx_poly_seq_scheme"], ("asym_id", "seq_id", "mon_id"), "chain_id"
        kinds = {}
    else:
        raise DataError("it lists no polymer sequence (neither entity_poly_seq nor pdbx_poly_seq_scheme)")
    residues: dict[str, dict[int, str]] = {}
    for owner, number, name in zip(*(listing[column].as_array(str).tolist() for column in columns)):
        residues.setdefault(owner, {}).setdefault(int(number), "MET" if name == "MSE" else name)
    sequences = {}
    for owner, by_number in residues.items():
        numbers = sorted(by_number)
        names = [by_number[number] for number in numbers]
        by_kind = owner in kinds and "hybrid" not in kinds[owner]
        sequences[owner] = (_POLYMERS.get(kinds[owner]) if by_kind else majority_type(names), numbers, names)
    return key, sequences


def _meta(block: pdbx.CIFBlock) -> dict[str, Any]:
    def first(category: str, column: str, of: Any = str) -> Any:
        try:
            values = block[category][column].as_array(str)
        except KeyError:
            return None
        return next((of(value) for value in values if value not in ("?", ".", "")), None)

    sources = (("refine", "ls_d_res_high"), ("em_3d_reconstruction", "resolution"), ("reflns", "d_resolution_high"))
    resolutions = [first(category, column, float) for category, column in sources]
    return {
        "title": first("struct", "title"),
        "method": first("exptl", "method"),
        "resolution": next((r for r in resolutions if r is not None), None),
        "release_date": first("pdbx_audit_revision_history", "revision_date"),
    }
