"""Sizes beyond what a small type, a fixed buffer or a dense table holds: chains, residues, tokens, atoms, boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpfold_train.data.features import contacts
from cpfold_train.data.features.contacts import clashing_chains, interfaces
from cpfold_train.data.stream.batch import collate, make_crop
from cpfold_train.data.stream.shards import scan, write_shard
from cpfold_train.data.stream.validate import check_sample
from cpfold_train.data.structures import pairwise, parse
from cpfold_train.data.structures.edit import take_chains
from cpfold_train.data.structures.entry import Entry
from cpfold_train.data.structures.pairwise import align
from cpfold_train.data.structures.structure import MAX_CHAINS, pack_structure, unpack_structure
from cpfold_train.errors import DataError
from cpfold_train.parallel.grid import Grid
from tests.synthetic import make_structure

LENGTHS = [6_200, *[20] * 330]


@pytest.fixture(scope="module")
def large():
    """A chain of over 5,000 residues among 331 chains; over 10,000 tokens and 100,000 atoms."""
    structure = make_structure(LENGTHS, ["protein"] * len(LENGTHS), atoms=(9, 10), spread=200.0, interfaces=[(0, 330)])
    assert len(structure) > 10_000 and len(structure.resolved) > 100_000
    return structure


def test_features_at_the_far_end_of_a_large_complex(large):
    """The part of the rank that has the last atoms: every index is what counting from the start gives."""
    count, atoms = len(large), len(large.resolved)
    crop = make_crop(large, {}, crop_size=20_000, max_msa_rows=2, draw=(0, 0, 0))
    padded = Grid(16, 16).pad_atoms(atoms)
    grid = Grid(16, 16, 1, (atoms - 1) * 256 // padded)
    batch = {name: x[0] for name, x in collate([crop], grid).items()}
    asym_id = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert batch["num_tokens"] == count
    for name, expected in {
        "asym_id": asym_id,
        "entity_id": asym_id,
        "residue_index": np.concatenate([np.arange(length) for length in LENGTHS]),
        "token_index": np.arange(count),
        "token_to_center_atom": 9 * np.arange(count),
        "frames_idx": np.repeat(9 * np.arange(count), 3).reshape(-1, 3),
    }.items():
        np.testing.assert_array_equal(np.asarray(batch[name])[:count], expected, err_msg=name)
    assert batch["token_atom_start"][-1] == atoms == 9 * count
    first, _ = grid.atoms(padded)
    own = int(batch["atom_pad_mask"].sum())
    assert first > 100_000 and 0 < own == atoms - first
    np.testing.assert_array_equal(batch["atom_to_token"][:own], np.arange(first, atoms) // 9)
    np.testing.assert_array_equal(batch["ref_space_uid"][:own], np.arange(first, atoms) // 9)
    np.testing.assert_array_equal(batch["chain_copies"][:, 0], 1 + np.arange(len(LENGTHS)))


def test_a_large_complex_survives_a_shard_and_a_cut(large, tmp_path):
    members = pack_structure(large)
    write_shard(tmp_path / "train-000000.tar", [(large.meta["id"], members)])
    index = scan(tmp_path / "train-000000.tar")
    assert index["chain_entity"].tolist() == [*range(331)] and index["interface"].tolist() == [[0, 330]]
    assert index["chain_length"][0] == 6_200
    stored = unpack_structure(members)
    check_sample(stored, {}, [], large.meta["id"])
    kept = take_chains(stored, np.arange(331) != 0)
    assert kept.asym_id[-1] == 329 and len(kept) == 6_600


def test_more_chains_than_numbers_are_refused(monkeypatch):
    """asym_id is int16 on disk."""
    assert np.iinfo(np.int16).max == MAX_CHAINS
    monkeypatch.setattr(parse, "MAX_CHAINS", 2)
    with pytest.raises(DataError, match="3 chains"):
        parse.build(Entry([None] * 3, {"source": "1abc.cif"}))


def test_contacts_in_a_large_box(monkeypatch):
    """Atoms far away must not make the list of cells larger than the memory, and change no contact."""
    near = make_structure([60, 60, 40], ["protein"] * 3, spread=4.0, unresolved=0.0, atoms=(5, 6))
    near.coords[300:600] = near.coords[:300] + np.float32(0.5)
    found = interfaces(near), clashing_chains(near)
    assert found[0] and found[1]
    cells = []

    made = contacts.CellList

    def counted(coords, cell_size):
        cells.append(np.prod(np.ceil(np.ptp(coords, axis=0).astype(float) / cell_size)))
        return made(coords, cell_size=cell_size)

    monkeypatch.setattr(contacts, "CellList", counted)
    coords = near.coords.copy()
    coords[near.asym_id[near.atom_token] == 2] += np.float32(4e3)
    far = replace(near, coords=coords)
    assert [pair for pair in found[0] if 2 not in pair] == interfaces(far)
    clashing_chains(far)
    assert max(cells) < 300**3


def test_long_sequences_are_split_at_words_that_they_share(monkeypatch):
    rng = np.random.default_rng(0)
    target = "".join(rng.choice([*"ACDEFGHIKLMNPQRSTVWY"], 400))
    queries = [target[:200] + target[230:], target[:100] + "XX" + target[102:], target[5:390], target + "GGG", "W" * 7]
    whole = [align(query, target) for query in queries]
    monkeypatch.setattr(pairwise, "MOST_PAIRS", 0)
    monkeypatch.setattr(pairwise, "_PAIRS_OF_PIECES", 10_000)
    largest = []
    optimal = pairwise.align_optimal

    def counted(first, second, *args, **settings):
        largest.append(len(first) * len(second))
        return optimal(first, second, *args, **settings)

    monkeypatch.setattr(pairwise, "align_optimal", counted)
    for query, expected in zip(queries, whole):
        np.testing.assert_array_equal(align(query, target), expected)
    assert max(largest) < 20_000


def test_chains_as_long_as_titin_are_aligned():
    """The table for all pairs of 34,350 residues would take ten gigabytes."""
    target = "".join(np.random.default_rng(1).choice([*"ACDEFGHIKLMNPQRSTVWY"], 34_350))
    query = target[:20_000] + "X" + target[20_001:30_000] + target[30_040:]
    found = align(query, target)
    expected = np.concatenate([np.arange(30_000), np.arange(30_040, 34_350)])
    assert (np.delete(found, 20_000) == np.delete(expected, 20_000)).all() and found[20_000] in (-1, 20_000)
