"""Reading structure files: a tiny one by hand, real entries against gemmi's reading of the same file."""

from collections import Counter
from importlib.resources import files

import biotite.structure.io.pdbx as pdbx
import gemmi
import numpy as np
import pytest

from cpfold_train.data.structures.parse import chain_letters, read_structure
from cpfold_train.vocabulary import BOND_TYPES, TOKENS
from tests.structures import ATOMS, PROTEIN_ATOMS, write_tiny


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path / "tiny.cif")


def names_of(structure):
    """Names of each token's component, and of each atom."""
    return structure.comp_name[structure.component].astype(str), structure.comp_atom_name[structure.ref_atom].astype(
        str
    )


def test_tiny_structure(tiny):
    structure, left_out = read_structure(tiny)
    names = [TOKENS[token] for token in structure.res_type]
    assert names == ["UNK", "MET", "GLY", "UNK", "ALA", "UNK"] * 2 + ["DA", "DC"]
    assert structure.modified.tolist() == [True, False, False, True, False, True] * 2 + [False] * 2
    assert structure.center[1].tolist() == [False, True, True, True, True, False] * 2 + [True, True]
    assert structure.res_index.tolist() == [*range(6), *range(6), 0, 1]
    chains = structure.meta["chains"]
    assert [(c["name"], c["auth_name"], c["entity"], c["sym"], c["type"], c["observed"]) for c in chains] == [
        ("A", "xA", 0, 0, "protein", 4),
        ("B", "xB", 0, 1, "protein", 4),
        ("C", "xC", 1, 0, "dna", 2),
    ]
    assert [chain_letters(structure, asym_id) for asym_id in range(3)] == ["XMGSAX", "XMGSAX", "AC"]
    assert left_out["water"] == 1
    assert (structure.meta["method"], structure.meta["resolution"]) == ("ELECTRON MICROSCOPY", 3.25)
    # the other alternative of B's alanine, and the sulphur that selenium stands for
    assert structure.center[0][10].tolist() == [80.0, 0.5, -1.25]
    methionine = slice(*structure.atom_start[1:3])
    assert "SD" in names_of(structure)[1][methionine][structure.resolved[methionine]]


def test_representative_atoms(tiny):
    structure, _ = read_structure(tiny)
    center, known = structure.disto_center
    atoms = structure.atom_start[:-1] + structure.disto_atom
    names = [str(names_of(structure)[1][atom]) if ok else None for atom, ok in zip(atoms, known)]
    assert names[:6] == [None, "CB", "CA", "CB", "CB", None]
    assert names[6:] == [None, "CB", "CA", "CB", None, None, "C4", "C2"]
    assert (center[~known] == 0).all()


def gemmi_atoms(path):
    """Coordinates by chain, position, residue and atom of all atoms that a sample should have, and the sequences."""
    structure = gemmi.read_structure(str(path))
    entity_of = {name: entity for entity in structure.entities for name in entity.subchains}
    atoms, sequences, positions, site_of = {}, {}, Counter(), {}
    for chain in structure[0]:
        for residue in chain:
            if residue.name in ("HOH", "DOD"):
                continue
            entity = entity_of[residue.subchain]
            if entity.entity_type == gemmi.EntityType.Polymer:
                sequence = [gemmi.Entity.first_mon(item) for item in entity.full_sequence]
                sequences[residue.subchain], position = sequence, residue.label_seq - 1
                if sequence[position] != residue.name:
                    continue
            else:
                position = positions[residue.subchain]
                positions[residue.subchain] += 1
            heavy = [atom for atom in residue if not atom.is_hydrogen()]
            occupancies = {}
            for atom in heavy:
                occupancies.setdefault(atom.altloc, []).append(atom.occ)
            occupancies.pop("\0", None)
            best = max(occupancies, key=lambda altloc: np.mean(occupancies[altloc])) if occupancies else None
            for atom in heavy:
                # The chains' last oxygen is no part of a residue's atoms, as in Boltz-2.
                if atom.altloc in ("\0", best) and not (residue.subchain in sequences and atom.name == "OXT"):
                    site = (residue.subchain, position, residue.name, atom.name)
                    atoms[site] = atom.pos.tolist()
                    site_of[chain.name, str(residue.seqid), residue.name, atom.name] = site
    links = set()
    for link in structure.connections:
        partners = (link.partner1, link.partner2)
        ends = [(p.chain_name, str(p.res_id.seqid), p.res_id.name, p.atom_name) for p in partners]
        if link.type == gemmi.ConnectionType.Covale and all(end in site_of for end in ends):
            links.add(frozenset(site_of[end] for end in ends))
    return atoms, sequences, links


@pytest.mark.parametrize("name", ["2gtl", "7ok9"])
def test_round_trip(name):
    """Every chain, sequence, coordinate and link of a real entry, from the sample and straight from the file."""
    path = files("tmtools") / "data" / f"{name}.cif"
    structure, _ = read_structure(path)
    atoms, sequences, links = gemmi_atoms(path)
    residue, atom = names_of(structure)
    token = structure.atom_token
    chain = np.array([chain["name"] for chain in structure.meta["chains"]])[structure.asym_id]
    columns = (chain[token], structure.res_index[token], residue[token], atom)
    sites = list(zip(*(column.tolist() for column in columns)))
    read = {site: position for site, position, known in zip(sites, structure.coords, structure.resolved) if known}
    swapped = 0
    for site in [site for site in read if site[2:] == ("ARG", "NH1")]:
        other = (*site[:3], "NH2")
        if other in atoms and not np.array_equal(read[site], np.float32(atoms[site])):
            # Of arginine's two, NH1 is the one nearer to CD whatever the file calls it.
            atoms[site], atoms[other] = atoms[other], atoms[site]
            swapped += 1
    assert read.keys() == atoms.keys()
    np.testing.assert_array_equal(np.stack([read[site] for site in atoms]), np.array(list(atoms.values()), np.float32))
    assert swapped == {"2gtl": 0, "7ok9": 20}[name]
    covalent = structure.bond_atoms[structure.bond_type == BOND_TYPES.index("covalent")]
    assert {frozenset((sites[a], sites[b])) for a, b in covalent.tolist()} == links
    polymers = [c["name"] for c in structure.meta["chains"] if c["type"] != "nonpolymer"]
    assert {each: residue[chain == each].tolist() for each in polymers} == sequences


def pdb_lines(residues, step=1.0):
    """ATOM records; each atom is ``step`` Angstrom from the one before it."""
    lines = []
    for number, residue in residues:
        for atom in ATOMS.get(residue, PROTEIN_ATOMS):
            serial = len(lines) + 1
            lines.append(
                f"ATOM  {serial:5d}  {atom:<3s} {residue} A{number:4d}    {step * serial:8.3f}{0.5:8.3f}{-1.25:8.3f}"
                f"  1.00 20.50          {atom[0]:>2s}"
            )
    return lines


def test_pdb_files_of_other_programs(tmp_path):
    """Residues are named by their protonation, a number is left out where nothing is missing, and the date is none."""
    lines = pdb_lines([(1, "HIE"), (2, "CYX"), (4, "HSE"), (1500, "ASH")], step=0.5)
    head = "REVDAT   1   unknown"
    (tmp_path / "md.pdb").write_bytes("\n".join(["REMARK \xe9", head, *lines, "END", ""]).encode("latin-1"))
    found, left_out = read_structure(tmp_path / "md.pdb")
    assert names_of(found)[0].tolist() == ["HIS", "CYS", "HIS", "ASP"]
    assert not sum(left_out.values()) and found.meta["release_date"] is None
    # Homoserine has an atom that histidine has not.
    lines = [line.replace("  CB  HSE", "  OD  HSE") for line in lines]
    (tmp_path / "homoserine.pdb").write_text("\n".join([*lines, "END", ""]))
    assert "HSE" in names_of(read_structure(tmp_path / "homoserine.pdb")[0])[0].tolist()


def test_formats_agree(tiny, tmp_path):
    """The same molecule as BinaryCIF, and as PDB with the sequence in SEQRES or left to the observed residues."""
    expected, _ = read_structure(tiny)
    block = pdbx.CIFFile.read(tiny).block

    def column(text):
        return pdbx.BinaryCIFColumn(text.as_array(str), None if text.mask is None else text.mask.array)

    columns = {name: pdbx.BinaryCIFCategory({k: column(v) for k, v in block[name].items()}) for name in block}
    binary = pdbx.BinaryCIFFile({"TINY": pdbx.BinaryCIFBlock(columns)})
    binary.write(tmp_path / "tiny.bcif")
    read, _ = read_structure(tmp_path / "tiny.bcif")
    np.testing.assert_array_equal(read.coords, expected.coords)
    assert names_of(read)[0].tolist() == names_of(expected)[0].tolist()

    lines = pdb_lines([(7, "GLY"), (8, "ALA"), (11, "SER")])
    (tmp_path / "bare.pdb").write_text("\n".join([*lines, "END", ""]))
    bare, _ = read_structure(tmp_path / "bare.pdb")
    assert names_of(bare)[0].tolist() == ["GLY", "ALA", "UNK", "UNK", "SER"]
    seqres = "SEQRES   1 A    6  MET GLY ALA GLY LEU SER"
    (tmp_path / "full.pdb").write_text("\n".join([seqres, *lines, "END", ""]))
    full, _ = read_structure(tmp_path / "full.pdb")
    assert names_of(full)[0].tolist() == ["MET", "GLY", "ALA", "GLY", "LEU", "SER"]
    assert full.center[1].tolist() == [False, True, True, False, False, True]
    np.testing.assert_array_equal(full.coords[full.resolved], bare.coords[bare.resolved])
