"""Boltz's processed entries, written here with the package's dtypes from a sample, come back as the same sample."""

import json

import numpy as np
import pytest

from cpfold_train.__main__ import main
from cpfold_train.data.alignments.a3m import file_key
from cpfold_train.data.prepare.boltz_format import read_boltz, read_boltz_alignment
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.structures.entry import Site
from cpfold_train.data.structures.structure import ARRAYS
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import MOL_TYPES, NONPOLYMER
from tests.structures import make_chain, make_structure

ATOM_V1 = [("name", "4i1"), ("element", "i1"), ("charge", "i1"), ("coords", "3f4"), ("conformer", "3f4")]
ATOM_V1 += [("is_present", "?"), ("chirality", "i1")]
ATOM_V2 = [("name", "<U4"), ("coords", "3f4"), ("is_present", "?"), ("bfactor", "f4"), ("plddt", "f4")]
RESIDUE = [("name", "<U5"), ("res_type", "i1"), ("res_idx", "i4"), ("atom_idx", "i4"), ("atom_num", "i4")]
RESIDUE += [("atom_center", "i4"), ("atom_disto", "i4"), ("is_standard", "?"), ("is_present", "?")]
CHAIN = [("name", "<U5"), ("mol_type", "i1"), ("entity_id", "i4"), ("sym_id", "i4"), ("asym_id", "i4")]
CHAIN += [("atom_idx", "i4"), ("atom_num", "i4"), ("res_idx", "i4"), ("res_num", "i4"), ("cyclic_period", "i4")]
LINK = [(f"{what}_{end}", "i4") for what in ("chain", "res", "atom") for end in (1, 2)]
SEQUENCE = [("seq_idx", "i2"), ("taxonomy", "i4"), ("res_start", "i4"), ("res_end", "i4")]
SEQUENCE += [("del_start", "i4"), ("del_end", "i4")]


@pytest.fixture
def sample():
    chains = [
        make_chain("A1", ["MET", "SEP", "GLY", "ARG", "ASN", "LEU"], missing=[3]),
        make_chain("B1", ["NAG", "NAG"], mol_type=NONPOLYMER, origin=(0, 20, 0)),
        make_chain("C1", ["MET", "SEP", "GLY", "ARG", "ASN", "LEU"], origin=(0, 40, 0)),
    ]
    links = [(Site("A1", 4, "CA"), Site("B1", 0, "C1")), (Site("B1", 0, "O4"), Site("B1", 1, "C1"))]
    return make_structure(chains, links, method="x-ray diffraction", resolution=2.5, release_date="2014-05-06")


def write_boltz(folder, structure, v1, masked=()):
    """The folder that the package's preprocessing would make of a sample."""
    for name in ("records", "structures", "msa"):
        (folder / name).mkdir(parents=True)
    names = structure.comp_atom_name[structure.ref_atom].astype("U4")
    atoms = np.zeros(len(names), dtype=ATOM_V1 if v1 else ATOM_V2)
    if v1:
        for i, name in enumerate(names.tolist()):
            atoms["name"][i, : len(name)] = [ord(c) - 32 for c in name]
    else:
        atoms["name"], atoms["bfactor"] = names, structure.b_factor
    atoms["coords"], atoms["is_present"] = structure.coords, structure.resolved
    token = structure.atom_token
    owner = np.stack([structure.asym_id[token], structure.res_index[token]], axis=1)
    starts = np.flatnonzero(np.any(np.diff(owner, axis=0, prepend=-1), axis=1))
    counts = np.diff([*starts, len(names)])
    residues = np.zeros(len(starts), dtype=RESIDUE)
    residues["name"] = structure.comp_name[structure.component[token[starts]]].astype("U5")
    residues["atom_idx"], residues["atom_num"], residues["is_present"] = starts, counts, True
    residue_of = np.repeat(np.arange(len(starts)), counts)
    chains = np.zeros(len(structure.meta["chains"]), dtype=CHAIN)
    for i, chain in enumerate(structure.meta["chains"]):
        own = np.flatnonzero(owner[starts, 0] == i)
        chains[i]["name"], chains[i]["mol_type"] = chain["name"], MOL_TYPES.index(chain["type"])
        chains[i]["res_idx"], chains[i]["res_num"] = own[0], len(own)
    bonds = np.zeros(len(structure.bond_atoms), dtype=LINK if v1 else [*LINK, ("type", "i1")])
    for end in (1, 2):
        bonds[f"atom_{end}"] = structure.bond_atoms[:, end - 1]
        bonds[f"res_{end}"] = residue_of[bonds[f"atom_{end}"]]
        bonds[f"chain_{end}"] = owner[bonds[f"atom_{end}"], 0]
    mask = ~np.isin(np.arange(len(chains)), masked)
    arrays = {"atoms": atoms, "residues": residues, "chains": chains, "mask": mask}
    # Before Boltz-2 bonds within residues had fields of their own, and links a table of theirs.
    arrays |= {"bonds": np.zeros(0, dtype=[("atom_1", "i4")]), "connections": bonds} if v1 else {"bonds": bonds}
    if not v1:
        arrays["pocket"] = np.array(None)
    np.savez_compressed(folder / "structures" / "1XYZ.npz", **arrays)
    info = {"resolution": 2.5, "method": "x-ray diffraction", "released": "2014-05-06"}
    msas = [
        {"chain_name": c["name"], "msa_id": "m7" if c["type"] == "protein" else -1} for c in structure.meta["chains"]
    ]
    record = {"id": "1XYZ", "structure": info, "chains": msas}
    (folder / "records" / "1XYZ.json").write_text(json.dumps(record))
    (folder / "manifest.json").write_text(json.dumps({"records": [record]}))
    return folder / "structures" / "1XYZ.npz"


def write_msa(path, rows, keys, deletions):
    """``rows`` of tokens; ``deletions``: (row, column, count)."""
    width = len(rows[0])
    sequences = np.zeros(len(rows), dtype=SEQUENCE)
    sequences["taxonomy"] = keys
    sequences["res_start"] = np.arange(len(rows)) * width
    sequences["res_end"] = sequences["res_start"] + width
    for row in range(len(rows)):
        sequences[row]["del_start"] = sum(deletion[0] < row for deletion in deletions)
        sequences[row]["del_end"] = sum(deletion[0] <= row for deletion in deletions)
    residues = np.array([(token,) for row in rows for token in row], dtype=[("res_type", "i1")])
    listed = np.array([deletion[1:] for deletion in deletions], dtype=[("res_idx", "i2"), ("deletion", "i2")])
    np.savez_compressed(path, sequences=sequences, residues=residues, deletions=listed)


@pytest.mark.parametrize("v1", [False, True])
def test_structure(sample, tmp_path, v1):
    read, left_out = read_boltz(write_boltz(tmp_path, sample, v1))
    for name in ARRAYS:
        if not (v1 and name == "b_factor"):  # which Boltz-1 does not store
            np.testing.assert_array_equal(getattr(read, name), getattr(sample, name), err_msg=name)
    assert read.meta["counts"] == sample.meta["counts"] and not any(left_out.values())
    for name in ("method", "resolution", "release_date"):
        assert read.meta[name] == sample.meta[name]


def test_masked_chains_are_left_out(sample, tmp_path):
    read, _ = read_boltz(write_boltz(tmp_path, sample, False, masked=[1]))
    assert [chain["name"] for chain in read.meta["chains"]] == ["A1", "C1"]


def test_alignment(tmp_path):
    write_msa(tmp_path / "m.npz", [[2, 3, 4], [2, 1, 4], [5, 5, 5]], [9, 9, -1], [(1, 0, 2), (1, 2, 300), (2, 1, 1)])
    alignment = read_boltz_alignment(tmp_path / "m.npz", 3)
    assert alignment.tokens.tolist() == [[2, 3, 4], [2, 1, 4], [5, 5, 5]]
    assert alignment.deletions.tolist() == [[0, 0, 0], [2, 0, 255], [0, 1, 0]]
    assert alignment.keys.tolist() == [-1, file_key("9"), -1]
    with pytest.raises(DataError, match=r"m\.npz .*\b4\b"):
        read_boltz_alignment(tmp_path / "m.npz", 4)


def test_prepare(sample, tmp_path):
    """A folder with a manifest is read as Boltz's; both copies of the chain share the alignment."""
    write_boltz(tmp_path / "in", sample, False)
    query = sample.res_type[sample.asym_id == 0].tolist()
    write_msa(tmp_path / "in" / "msa" / "m7.npz", [query, [*query[:5], 1]], [-1, 5], [])
    options = ["--min-residues", "4", "--workers", "1"]
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    entries = open_shards([str(tmp_path / "out" / "*.tar")])
    structure, alignments, _ = read_sample(entries[0])
    assert [entry.key for entry in entries] == ["1xyz"] and structure.meta["id"] == "1xyz"
    np.testing.assert_array_equal(structure.coords, sample.coords)
    assert list(alignments) == [0] and alignments[0].keys.tolist() == [-1, file_key("5")]


def test_what_is_wrong_is_told(sample, tmp_path):
    path = write_boltz(tmp_path, sample, False)
    (tmp_path / "records" / "1XYZ.json").unlink()
    with pytest.raises(DataError, match=r"1XYZ\.npz .*1XYZ\.json"):
        read_boltz(path)
    write_boltz(tmp_path / "cut", sample, False)
    cut = tmp_path / "cut" / "structures" / "1XYZ.npz"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"1XYZ\.npz .*BadZipFile"):
        read_boltz(cut)
