"""Read mmCIF and BinaryCIF."""

from __future__ import annotations

from typing import Any

import biotite.structure as struc
import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.entry import Entry, Polymer, count_left_out, heavy, majority_type
from cpfold_train.data.residues import DNA, PROTEIN, RNA
from cpfold_train.errors import DataError

_POLYMERS = {"polypeptide(L)": PROTEIN, "polydeoxyribonucleotide": DNA, "polyribonucleotide": RNA}


def read_mmcif(block: pdbx.CIFBlock) -> Entry:
    """Polymers by label (not author) chain and residue numbers, sequences as deposited."""
    atoms = pdbx.get_structure(
        block,
        model=1,
        altloc="occupancy",
        use_author_fields=False,
        extra_fields=["b_factor", "label_entity_id", "auth_asym_id"],
    )
    atoms = heavy(atoms)
    entry = Entry([], _meta(block))
    key, sequences = _sequences(block)
    in_polymer = np.isin(atoms.get_annotation(key), list(sequences)) & (atoms.res_id > 0)
    count_left_out(atoms[~in_polymer], entry.left_out)
    atoms = atoms[in_polymer]
    for name in dict.fromkeys(atoms.chain_id.tolist()):
        chain = atoms[atoms.chain_id == name]
        mol_type, numbers, sequence = sequences[str(chain.get_annotation(key)[0])]
        if mol_type is None:
            entry.left_out["other polymer"] += struc.get_residue_count(chain)
            continue
        place = np.searchsorted(numbers, chain.res_id).clip(max=len(numbers) - 1)
        # At a heterogeneous position the sequence lists the main residue first; atoms of the others are dropped.
        same = (np.array(sequence)[place] == chain.res_name) & (np.array(numbers)[place] == chain.res_id)
        if not same.all():
            entry.left_out["other residue at the position"] += len(np.unique(place[~same]))
        entry.polymers.append(Polymer(name, str(chain.auth_asym_id[0]), mol_type, sequence, chain[same], place[same]))
    return entry


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

    places = (("refine", "ls_d_res_high"), ("em_3d_reconstruction", "resolution"), ("reflns", "d_resolution_high"))
    resolutions = [first(category, column, float) for category, column in places]
    return {
        "title": first("struct", "title"),
        "method": first("exptl", "method"),
        "resolution": next((r for r in resolutions if r is not None), None),
        "release_date": first("pdbx_audit_revision_history", "revision_date"),
    }
