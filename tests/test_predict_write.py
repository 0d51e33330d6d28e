"""What is written is read back the same: by our own reader, by biotite and by gemmi."""

from pathlib import Path

import biotite.structure as struc
import biotite.structure.io.pdbx as pdbx
import gemmi
import numpy as np
import pytest

from cpfold_train.data.features.atoms import crop_atoms
from cpfold_train.data.inputs.sequences import read_sequences
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.structures.parse import read_structure
from cpfold_train.data.structures.structure import ARRAYS, Structure
from cpfold_train.predict.write import write_arrays, write_structure
from cpfold_train.vocabulary import BOND_TYPES, NONPOLYMER
from tests.structures import make_chain, make_structure

SHARD = str(Path(__file__).parent / "data" / "train-000000.tar")


def sample_of(key) -> Structure:
    return read_sample(next(entry for entry in open_shards([SHARD]) if entry.key == key))[0]


def written(path, structure, tokens=None, seed=0):
    """Write random coordinates and confidences, and return them."""
    tokens = np.arange(len(structure)) if tokens is None else tokens
    atoms = crop_atoms(structure, tokens)
    rng = np.random.default_rng(seed)
    coords = np.round(rng.normal(scale=30, size=(len(atoms.atom), 3)), 3)
    plddt = rng.random(len(tokens))
    write_structure(path, structure, tokens, atoms, coords, plddt, "a title, 'quoted'")
    return atoms, coords, plddt


def assert_same(read: Structure, structure: Structure, atoms, coords, plddt):
    """Arginine's NH1 and NH2 may have changed places in the random coordinates: the reader puts NH1 nearer to CD."""
    for name in ARRAYS:
        if name not in ("coords", "resolved", "b_factor"):
            assert np.array_equal(getattr(read, name), getattr(structure, name)), name
    assert np.flatnonzero(read.resolved).tolist() == atoms.atom.tolist()
    names = structure.comp_atom_name[structure.ref_atom[atoms.atom]]
    fixed = ~np.isin(names, (b"NH1", b"NH2"))
    assert np.allclose(read.coords[atoms.atom][fixed], coords[fixed], atol=1e-5)
    assert np.allclose(read.b_factor[atoms.atom], 100 * plddt[atoms.token], atol=0.0051)


@pytest.mark.parametrize("key", ["7pzb", "4hhb"])
def test_our_own_reader(tmp_path, key):
    """Protein, DNA and ligands."""
    structure = sample_of(key)
    out = tmp_path / f"{key}.cif"
    atoms, coords, plddt = written(out, structure)
    read, _ = read_structure(out)
    assert_same(read, structure, atoms, coords, plddt)
    for chain, expected in zip(read.meta["chains"], structure.meta["chains"]):
        assert {name: chain[name] for name in ("entity", "sym", "type", "length")} == {
            name: expected[name] for name in ("entity", "sym", "type", "length")
        }


def test_biotite_and_gemmi(tmp_path):
    structure = sample_of("7pzb")
    out = tmp_path / "out.cif"
    atoms, coords, plddt = written(out, structure)
    names = structure.comp_atom_name[structure.ref_atom[atoms.atom]].astype(str).tolist()
    array = pdbx.get_structure(pdbx.CIFFile.read(out), model=1, extra_fields=["b_factor"])
    assert array.atom_name.tolist() == names
    assert np.allclose(array.coord, coords, atol=1e-4)
    assert np.allclose(array.b_factor, 100 * plddt[atoms.token], atol=0.0051)
    rows = pdbx.CIFFile.read(out).block["atom_site"]
    numbered = rows["label_seq_id"].as_array(str) != "."
    assert numbered.tolist() == structure.polymer[structure.atom_token[atoms.atom]].tolist()
    polymers = [chain for chain in structure.meta["chains"] if chain["type"] != "nonpolymer"]
    assert struc.filter_amino_acids(array).any()
    assert struc.filter_nucleotides(array).any()

    document = gemmi.cif.read(str(out))
    assert document.sole_block().find_value("_struct.title").startswith('"a title')
    entry = gemmi.read_structure(str(out))
    assert [atom.atom.name for atom in entry[0].all()] == names
    assert [chain.name for chain in entry[0]] == [chain["name"] for chain in structure.meta["chains"]]
    sequences = {tuple(entity.subchains): list(entity.full_sequence) for entity in entry.entities}
    assert sum(len(sequence) > 0 for sequence in sequences.values()) == len({chain["entity"] for chain in polymers})
    for chains, sequence in sequences.items():
        for name in chains:
            number = [chain["name"] for chain in structure.meta["chains"]].index(name)
            own = structure.asym_id == number
            if structure.chains["mol_type"][number] != NONPOLYMER:
                assert sequence == structure.comp_name[structure.component[own]].astype(str).tolist()
    kinds = [(entity.entity_type, entity.polymer_type) for entity in entry.entities]
    assert (gemmi.EntityType.Polymer, gemmi.PolymerType.Dna) in kinds
    assert (gemmi.EntityType.NonPolymer, gemmi.PolymerType.Unknown) in kinds


def test_modified_residues_and_links(tmp_path):
    """A ligand bonded to a residue keeps its bond, and loses the atoms that it loses."""
    job = tmp_path / "job.yaml"
    job.write_text(
        "sequences:\n"
        "- protein: {id: A, sequence: MNSAG, modifications: [{position: 3, ccd: SEP}]}\n"
        "- rna: {id: B, sequence: ACGU, cyclic: true}\n"
        "- ligand: {id: C, ccd: [NAG, NAG]}\n"
        "constraints:\n"
        "- bond: {atom1: [A, 2, ND2], atom2: [C, 1, C1]}\n"
        "- bond: {atom1: [C, 1, O4], atom2: [C, 2, C1]}\n"
    )
    structure = read_sequences(job).structure
    out = tmp_path / "job.cif"
    atoms, coords, plddt = written(out, structure)
    read, _ = read_structure(out)
    assert_same(read, structure, atoms, coords, plddt)
    assert (read.bond_type == BOND_TYPES.index("covalent")).sum() == 3
    connections = gemmi.read_structure(str(out)).connections
    assert sorted((c.partner1.atom_name, c.partner2.atom_name) for c in connections) == [
        ("ND2", "C1"),
        ("O4", "C1"),
        ("P", "O3'"),
    ]


def test_a_crop_has_its_atoms_and_all_of_the_sequences(tmp_path):
    structure = sample_of("4hhb")
    tokens = np.concatenate([np.arange(10, 60), np.flatnonzero(structure.asym_id == 4)])
    out = tmp_path / "crop.cif"
    _, coords, _ = written(out, structure, tokens)
    read, _ = read_structure(out)
    assert [(chain["name"], chain["length"], chain["observed"]) for chain in read.meta["chains"]] == [
        ("A", 141, 50),
        (structure.meta["chains"][4]["name"], 1, 1),
    ]
    assert read.resolved.sum() == len(coords)


def test_copies_of_an_assembly_have_names_of_their_own(tmp_path):
    structure = make_structure([make_chain(name, ["GLY", "ALA"]) for name in ("A", "A-2", "A2")])
    out = tmp_path / "copies.cif"
    written(out, structure)
    assert [chain["name"] for chain in read_structure(out)[0].meta["chains"]] == ["A", "A2", "A2x2"]


def test_without_confidence_the_b_factors_are_zero(tmp_path):
    structure = make_structure([make_chain("A", ["GLY", "ALA"])])
    atoms = crop_atoms(structure, np.arange(2))
    write_structure(tmp_path / "a.cif", structure, np.arange(2), atoms, np.zeros((len(atoms.atom), 3)), None, "none")
    assert not read_structure(tmp_path / "a.cif")[0].b_factor.any()
    assert [path.name for path in tmp_path.iterdir()] == ["a.cif"]


def test_arrays(tmp_path):
    arrays = {"plddt": np.random.default_rng(0).random(5), "pae": np.eye(5)}
    write_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as read:
        assert all(np.allclose(read[name], value) and read[name].dtype == np.float32 for name, value in arrays.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
