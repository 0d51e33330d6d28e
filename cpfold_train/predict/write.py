"""A predicted structure as files: mmCIF, and arrays of what the model thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import biotite.structure.io.pdbx as pdbx
import numpy as np

from cpfold_train.data.features.atoms import CropAtoms
from cpfold_train.data.structures.components import SYMBOLS
from cpfold_train.data.structures.parse import chain_letters
from cpfold_train.data.structures.structure import Structure
from cpfold_train.vocabulary import BOND_TYPES
from cpfold_train.whole_file import whole_file

_POLYMERS = {"protein": "polypeptide(L)", "dna": "polydeoxyribonucleotide", "rna": "polyribonucleotide"}


def write_structure(
    path: Path,
    structure: Structure,
    tokens: np.ndarray,
    atoms: CropAtoms,
    coords: np.ndarray,
    plddt: np.ndarray | None,
    title: str,
) -> None:
    """Write a predicted structure as mmCIF.

    Sequences are complete, and chains have mmCIF's names, for authors too; a copy in an assembly, ``A-2``, is ``A2``.

    Args:
        tokens: (n,) tokens that were predicted.
        atoms: their A atoms.
        coords: (A, 3) in Angstrom.
        plddt: (n,) in 0-1, which becomes the B-factor times 100; None writes zeros.
    """
    names = _chain_names(structure)
    block = pdbx.CIFBlock()
    block["entry"] = _category(id=[structure.meta["id"]])
    block["struct"] = _category(entry_id=[structure.meta["id"]], title=[title])
    block.update(_entities(structure, names))
    block["struct_asym"] = _category(
        id=names, entity_id=[str(chain["entity"] + 1) for chain in structure.meta["chains"]]
    )
    links = _links(structure, atoms, names)
    if links is not None:
        block["struct_conn"] = links
    block["atom_site"] = _atom_site(structure, tokens, atoms, coords, plddt, names)
    file = pdbx.CIFFile({structure.meta["id"]: block})
    with whole_file(path) as written:
        file.write(written)


def _chain_names(structure: Structure) -> list[str]:
    """Names without the hyphens of copies, which mmCIF's readers take for other things; all are different."""
    names: list[str] = []
    for chain in structure.meta["chains"]:
        name = plain = chain["name"].replace("-", "")
        number = 1
        while name in names:
            number += 1
            name = f"{plain}x{number}"
        names.append(name)
    return names


def _category(**columns: Sequence[str] | np.ndarray) -> pdbx.CIFCategory:
    """Columns of text; ``.`` says that a value does not apply."""
    found = {}
    for name, values in columns.items():
        values = np.asarray(values, dtype=str)
        mask = np.where(values == ".", pdbx.MaskValue.INAPPLICABLE, pdbx.MaskValue.PRESENT)
        found[name] = pdbx.CIFColumn(pdbx.CIFData(values), pdbx.CIFData(mask) if mask.any() else None)
    return pdbx.CIFCategory(found)


def _entities(structure: Structure, names: list[str]) -> dict[str, pdbx.CIFCategory]:
    first: dict[int, int] = {}
    for asym_id, chain in enumerate(structure.meta["chains"]):
        first.setdefault(chain["entity"], asym_id)
    entity, poly, sequence = [], [], []
    for number, asym_id in sorted(first.items()):
        chain, residues = structure.meta["chains"][asym_id], _residue_names(structure, asym_id)
        label = str(number + 1)
        if chain["type"] == "nonpolymer":
            entity.append((label, "non-polymer", "-".join(residues)))
            continue
        copies = [name for name, other in zip(names, structure.meta["chains"]) if other["entity"] == number]
        entity.append((label, "polymer", chain["type"]))
        poly.append((label, _POLYMERS[chain["type"]], ",".join(copies), chain_letters(structure, asym_id)))
        sequence += [(label, str(number), name) for number, name in enumerate(residues, 1)]
    rows = {
        "entity": (("id", "type", "pdbx_description"), entity),
        "entity_poly": (("entity_id", "type", "pdbx_strand_id", "pdbx_seq_one_letter_code_can"), poly),
        "entity_poly_seq": (("entity_id", "num", "mon_id"), sequence),
    }
    return {name: _category(**dict(zip(columns, zip(*values)))) for name, (columns, values) in rows.items() if values}


def _residue_names(structure: Structure, asym_id: int) -> list[str]:
    own = np.flatnonzero(structure.asym_id == asym_id)
    first = own[np.unique(structure.res_index[own], return_index=True)[1]]
    return structure.comp_name[structure.component[first]].astype(str).tolist()


def _links(structure: Structure, atoms: CropAtoms, names: list[str]) -> pdbx.CIFCategory | None:
    """The covalent links between residues of which both ends were predicted."""
    pairs = structure.bond_atoms[structure.bond_type == BOND_TYPES.index("covalent")]
    pairs = pairs[np.isin(pairs, atoms.atom).all(axis=1)]
    if not len(pairs):
        return None
    columns: dict[str, Sequence[str] | np.ndarray] = {
        "id": [f"covale{number + 1}" for number in range(len(pairs))],
        "conn_type_id": ["covale"] * len(pairs),
    }
    for end, atom in (("1", pairs[:, 0]), ("2", pairs[:, 1])):
        labels = _labels(structure, atom, names)
        for label in ("asym_id", "comp_id", "seq_id", "atom_id"):
            columns[f"ptnr{end}_label_{label}"] = labels[label]
        columns[f"ptnr{end}_auth_asym_id"] = labels["asym_id"]
        columns[f"ptnr{end}_auth_seq_id"] = labels["auth_seq_id"]
        columns[f"pdbx_ptnr{end}_PDB_ins_code"] = columns[f"ptnr{end}_symmetry"] = ["."] * len(pairs)
    return _category(**columns)


def _labels(structure: Structure, atom: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """What names atoms of the structure; residues of ligands have no number but the authors'."""
    token = structure.atom_token[atom]
    number = (structure.res_index[token] + 1).astype(str)
    return {
        "asym_id": np.array(names)[structure.asym_id[token]],
        "comp_id": structure.comp_name[structure.component[token]].astype(str),
        "seq_id": np.where(structure.polymer[token], number, "."),
        "auth_seq_id": number,
        "atom_id": structure.comp_atom_name[structure.ref_atom[atom]].astype(str),
    }


def _atom_site(
    structure: Structure,
    tokens: np.ndarray,
    atoms: CropAtoms,
    coords: np.ndarray,
    plddt: np.ndarray | None,
    names: list[str],
) -> pdbx.CIFCategory:
    labels = _labels(structure, atoms.atom, names)
    token = tokens[atoms.token]
    entity = np.array([str(chain["entity"] + 1) for chain in structure.meta["chains"]])
    standard = structure.polymer[token] & ~structure.modified[token]
    b_factor = np.zeros(len(coords)) if plddt is None else 100 * plddt[atoms.token]
    count = len(coords)
    return _category(
        group_PDB=np.where(standard, "ATOM", "HETATM"),
        id=np.arange(1, count + 1),
        type_symbol=np.array(SYMBOLS)[structure.comp_element[structure.ref_atom[atoms.atom]]],
        label_atom_id=labels["atom_id"],
        label_alt_id=["."] * count,
        label_comp_id=labels["comp_id"],
        label_asym_id=labels["asym_id"],
        label_entity_id=entity[structure.asym_id[token]],
        label_seq_id=labels["seq_id"],
        pdbx_PDB_ins_code=["."] * count,
        **{f"Cartn_{axis}": np.char.mod("%.3f", coords[:, x]) for x, axis in enumerate("xyz")},
        occupancy=["1.00"] * count,
        B_iso_or_equiv=np.char.mod("%.2f", b_factor),
        auth_seq_id=labels["auth_seq_id"],
        auth_comp_id=labels["comp_id"],
        auth_asym_id=labels["asym_id"],
        auth_atom_id=labels["atom_id"],
        pdbx_PDB_model_num=["1"] * count,
    )


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays in fp32 as compressed npz: ``plddt`` (n,) in 0-1, ``pae`` and ``pde`` (n, n) in Angstrom."""
    with whole_file(path, "wb") as file:
        np.savez_compressed(file, **{name: value.astype(np.float32) for name, value in arrays.items()})
