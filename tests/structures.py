"""Small structures and structure files for tests."""

import biotite.structure as struc
import numpy as np

from cpfold_train.data.structures.components import component
from cpfold_train.data.structures.entry import Chain, Entry
from cpfold_train.data.structures.parse import build
from cpfold_train.vocabulary import NONPOLYMER, PROTEIN

ATOMS = {"GLY": ["N", "CA", "C", "O"], "DA": ["P", "C1'", "C2", "C4"], "DC": ["P", "C1'", "C2", "C4"], "HOH": ["O"]}
PROTEIN_ATOMS = ["N", "CA", "C", "O", "CB"]


def make_chain(name, sequence, origin=(0.0, 0.0, 0.0), step=3.8, mol_type=PROTEIN, missing=()):
    """A chain along x. Only center atoms of a polymer's residues are resolved; a ligand's atoms are half an Å apart."""
    names, positions, coords = [], [], []
    for position, residue in enumerate(sequence):
        if position in missing:
            continue
        known = component(residue).names.astype(str).tolist() if component(residue) else ["CA"]
        own = known if mol_type == NONPOLYMER else ["CA" if mol_type == PROTEIN else "C1'"]
        for i, atom in enumerate(own):
            names.append(atom)
            positions.append(position)
            coords.append(np.add(origin, (position * step, 0.5 * i, 0.0)))
    atoms = struc.AtomArray(len(names))
    atoms.coord = np.array(coords, dtype=np.float32).reshape(-1, 3)
    atoms.atom_name = np.array(names, dtype="U6")
    atoms.set_annotation("b_factor", np.full(len(names), 20.0))
    return Chain(name, f"x{name}", mol_type, list(sequence), atoms, np.array(positions, dtype=np.int64))


def make_structure(chains, links=(), **meta):
    """A structure of such chains."""
    known = {"id": "made", "title": None, "method": None, "resolution": None, "release_date": None, "source": "made"}
    return build(Entry(chains, known | meta, list(links)))


def write_mmcif(path, chains, sequences, types, extra=()):
    """A tiny mmCIF. ``chains``: (name, entity, [(number, residue)]); ``extra``: whole atom rows to add."""
    rows, x = [], 0.0
    for name, entity, residues in chains:
        for number, residue in residues:
            for atom in ATOMS.get(residue, PROTEIN_ATOMS):
                if residue == "MSE" and atom == "CB":
                    rows.append(("HETATM", "SE", "SE", ".", residue, name, entity, number, x, 1.0))
                rows.append(("ATOM", atom[0], atom, ".", residue, name, entity, number, x, 1.0))
                x += 1.0
    rows += extra
    lines = ["data_TINY", "_exptl.method 'ELECTRON MICROSCOPY'", "_em_3d_reconstruction.resolution 3.25", "loop_"]
    lines += ["_entity_poly.entity_id", "_entity_poly.type", *(f"{e} '{kind}'" for e, kind in types.items())]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    lines += [f"{e} {i + 1} {name}" for e, names in sequences.items() for i, name in enumerate(names)]
    columns = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id"
    )
    columns += " Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_comp_id auth_asym_id auth_atom_id"
    lines += [
        "loop_",
        *(f"_atom_site.{column}" for column in [*columns.split(), "pdbx_PDB_ins_code", "pdbx_PDB_model_num"]),
    ]
    for i, (group, element, atom, alt, residue, name, entity, number, x, occupancy) in enumerate(rows):
        columns = f"{x:.3f} 0.5 -1.25 {occupancy} 20.5"
        seq, quoted = ("." if residue == "HOH" else number), f'"{atom}"'
        lines.append(
            f"{group} {i + 1} {element} {quoted} {alt} {residue} {name} {entity} {seq} {columns} {number} {residue} "
            f"x{name} {quoted} ? 1"
        )
    path.write_text("\n".join(lines) + "\n")


def write_tiny(path):
    """Two copies of a peptide (one listed backwards) with a gap and a modified residue, DNA, and a water."""
    peptide = ["ACE", "MSE", "GLY", "SEP", "ALA", "XXX"]
    seen = [(2, "MSE"), (3, "GLY"), (4, "SEP"), (5, "ALA")]
    alternatives = [
        ("ATOM", "C", "CA", alt, "ALA", "B", 1, 5, x, occupancy)
        for alt, x, occupancy in (("A", 70, 0.3), ("B", 80, 0.7))
    ]
    write_mmcif(
        path,
        [("A", 1, seen[::-1]), ("B", 1, seen[:3]), ("C", 2, [(1, "DA"), (2, "DC")]), ("D", 3, [(1, "HOH")])],
        {1: peptide, 2: ["DA", "DC"]},
        {1: "polypeptide(L)", 2: "polydeoxyribonucleotide"},
        alternatives,
    )
    return path


def write_a3m(path, *rows):
    """An a3m of (header, sequence)."""
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in rows))
    return path
