"""Sequences to predict, from FASTA and YAML."""

import gzip
import re

import numpy as np
import pytest

from cpfold_train.data.features.conditioning import BINDER_TO_POCKET, CONTACT, POCKET_TO_BINDER, UNSELECTED
from cpfold_train.data.features.tokens import token_features
from cpfold_train.data.inputs.complex import crop_of
from cpfold_train.data.inputs.sequences import read_sequences
from cpfold_train.data.stream.batch import collate
from cpfold_train.data.structures.parse import chain_letters
from cpfold_train.errors import DataError
from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import BOND_TYPES
from tests.structures import write_a3m, write_mmcif

YAML = """
version: 1
sequences:
  - protein: {id: [A, B], sequence: MKSAG, msa: own.a3m, modifications: [{position: 3, ccd: SEP}]}
  - dna: {id: NO, sequence: ACGT}
  - rna: {id: R, sequence: ACGU, cyclic: true}
  - ligand: {id: L, ccd: ATP}
constraints:
  - bond: {atom1: [A, 2, NZ], atom2: [L, 1, PG]}
  - pocket: {binder: L, contacts: [[A, 1], [B, 2]], max_distance: 8}
  - contact: {token1: [A, 4], token2: [L, PA]}
templates:
  - {cif: shown.cif, chain_id: B}
"""


@pytest.fixture
def read(tmp_path):
    own = write_a3m(tmp_path / "own.a3m", ("query", "MKSAG"), ("other", "MRSA-"))
    (tmp_path / "cut.a3m.gz").write_bytes(gzip.compress(own.read_bytes())[:-12])
    shown = [(1, "LYS"), (2, "SER"), (3, "ALA")]
    write_mmcif(tmp_path / "shown.cif", [("X", 1, shown)], {1: [name for _, name in shown]}, {1: "polypeptide(L)"})

    def of(text, name="job.yaml"):
        (tmp_path / name).write_text(text)
        return read_sequences(tmp_path / name)

    return of


def test_fasta(read):
    sample = read(">A|protein|own.a3m\nMKS\nAG\n>B|protein|own.a3m\nMKSAG\n>C|dna\nACGT\n>D|ccd\nHEM\n", "Job.fasta")
    structure = sample.structure
    assert structure.meta["id"] == "job"
    chains = [(c["name"], c["type"], c["entity"], c["length"]) for c in structure.meta["chains"]]
    expected = [("A", "protein", 0, 5), ("B", "protein", 0, 5), ("C", "dna", 1, 4), ("D", "nonpolymer", 2, 1)]
    assert chains == expected
    assert [chain_letters(structure, chain) for chain in range(3)] == ["MKSAG", "MKSAG", "ACGT"]
    assert len(structure) == 5 + 5 + 4 + 43, "haem has 43 heavy atoms"
    assert not structure.resolved.any()
    assert {entity: len(alignment) for entity, alignment in sample.alignments.items()} == {0: 2}


def test_yaml(read):
    sample = read(YAML)
    structure = sample.structure
    names = [chain["name"] for chain in structure.meta["chains"]]
    assert names == ["A", "B", "NO", "R", "L"]
    assert structure.modified[:5].tolist() == [False, False, True, False, False]
    period = token_features(structure, np.arange(len(structure)))["cyclic_period"]
    assert set(period[structure.asym_id == 3]) == {4.0}
    assert not period[structure.asym_id != 3].any()
    covalent = structure.bond_atoms[structure.bond_type == BOND_TYPES.index("covalent")]
    atoms = structure.comp_atom_name[structure.ref_atom[covalent]].astype(str).tolist()
    assert sorted(atoms) == [["NZ", "PG"], ["P", "O3'"]]
    assert np.unique(structure.asym_id[sample.templates[0].token]).tolist() == [1]
    assert sample.templates[0].token.tolist() == [6, 7, 8], "KSA of chain B"


def test_conditions_reach_the_features(read):
    sample = read(YAML)
    batch = collate([crop_of(sample, None, 8, 0)], Grid())
    kinds, thresholds = batch["contact_conditioning"][0].numpy(), batch["contact_threshold"][0].numpy()
    ligand = np.flatnonzero(sample.structure.asym_id == 4)
    names = sample.structure.comp_atom_name[sample.structure.ref_atom[sample.structure.atom_start[ligand]]]
    phosphorus = ligand[names.tolist().index(b"PA")]
    assert (kinds[np.ix_(ligand, [0, 6])] == BINDER_TO_POCKET).all()
    assert (kinds[np.ix_([0, 6], ligand)] == POCKET_TO_BINDER).all()
    assert kinds[3, phosphorus] == kinds[phosphorus, 3] == CONTACT
    assert (thresholds[0, ligand[0]], thresholds[3, phosphorus]) == (8, 6)
    assert kinds[1, 2] == UNSELECTED
    assert (kinds != UNSELECTED).sum() == 4 * len(ligand) + 2


def test_a_crop_takes_its_conditions_along(read):
    sample = read(YAML)
    crop = crop_of(sample, 20, 8, 0)
    assert len(crop.tokens) <= 20
    for condition in crop.conditions:
        assert (np.concatenate([condition.rows, condition.columns]) < len(crop.tokens)).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("ccd: ATP", "smiles: CCO"), "SMILES"),
        (("ccd: ATP", "ccd: QQQQQ"), "QQQQQ"),
        (("id: L,", "id: R,"), "two .* R"),
        (("msa: own.a3m", "msa: gone.a3m"), "gone.a3m"),
        (("position: 3", "position: 9"), "1 to 5"),
        (("atom1: [A, 2, NZ]", "atom1: [A, 1, NZ]"), "residue 1 .*A .*MET.* NZ"),
        (("binder: L", "binder: Z"), "chain Z"),
        (("max_distance: 8", "max_distance: 2"), "max_distance .*4 to 20"),
        (("max_distance: 8", "force: true"), "force"),
        (("[A, 4]", "[A, 40]"), "A .*40"),
        (("chain_id: B", "chain_id: NO"), "protein"),
        (("cif: shown.cif", "cif: gone.cif"), "gone.cif"),
        (("version: 1", "version: 2"), "version 2"),
        (("templates:", "properties:"), "properties"),
        (("sequence: ACGU", "sequence: AC-U"), "letters"),
        (("- dna:", "- fat:"), "fat"),
        (("sequence: ACGU", "sequence: [ACGU]"), "Error"),
        (("msa: own.a3m", "msa: cut.a3m.gz"), "EOFError"),
    ],
)
def test_mistakes_are_told_in_a_sentence(read, change, told):
    assert change[0] in YAML
    with pytest.raises(DataError, match=r"^job") as error:
        read(YAML.replace(*change))
    assert re.search(told, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (">A\nMKS\n", "A"),
        (">A|smiles\nCCO\n", "SMILES"),
        ("MKS\n", "header"),
        (">A|ccd\nATP\n", "protein, dna or rna"),
    ],
)
def test_mistakes_in_fasta(read, text, told):
    with pytest.raises(DataError, match=r"^job") as error:
        read(text, "job.fasta")
    assert re.search(told, str(error.value))


def test_random_draws_depend_on_the_id_alone(read):
    first, second = crop_of(read(YAML), None, 8, 0), crop_of(read(YAML, "other.yaml"), None, 8, 0)
    assert first.sample_key == crop_of(read(YAML), None, 8, 0).sample_key
    assert len({first.sample_key, second.sample_key, crop_of(read(YAML), None, 8, 1).sample_key}) == 3
