"""Crops, MSA assembly and the features of a tile, against brute force and across grids."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.features import msa
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.features.tokens import bond_tile, distogram_tile, token_features
from cpfold_train.data.schema import ATOMS, FEATURES, HOST, TILE
from cpfold_train.data.stream.batch import Augmentation, make_crop, tile_features
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import BOND_TYPES, GAP

GRIDS = [(1, 2), (2, 1), (2, 2), (2, 3), (3, 3)]
ALL = Augmentation(single_sequence=0.0, random_depth=True, random_templates=True, pocket=0.8, contact=0.8)


@pytest.fixture(scope="module")
def samples():
    entries = open_shards(["data/large/*.tar", "tests/data/*.tar"])
    return {entry.key: entry for entry in entries}


def crop_of(samples, key, **settings):
    settings = {"crop_size": 131, "max_msa_rows": 37, "draw": (0, 0, 0)} | settings
    return make_crop(*read_sample(samples[key]), **settings)


def whole(crop, s=37):
    """All features of a crop on one rank, without padding of tokens."""
    return tile_features(crop, Grid(), len(crop.tokens), s, Grid().pad_atoms(len(crop.atoms.atom)))


def test_depth_of_the_alignment_is_drawn_evenly_from_the_query_alone_to_the_most(samples):
    sample = read_sample(samples["7pzb"])
    settings = {"crop_size": 4, "max_msa_rows": 3, "augmentation": Augmentation(random_depth=True)}
    depths = [len(make_crop(*sample, **settings, draw=(0, 0, position)).rows.sampled) for position in range(90)]
    assert [abs(depths.count(depth) - 30) < 12 for depth in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize("key", ["4hhb", "7pzb", "3l4q"])
@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_tiles_are_parts_of_the_whole(samples, key, rows, cols):
    """The union of all ranks' parts is what a single rank has, bit for bit."""
    structure, alignments, _ = read_sample(samples[key])
    template = make_template(structure, structure, [(0, 0), (1, 1)])
    crop = make_crop(
        structure, alignments, [template] * 3, crop_size=131, max_msa_rows=37, augmentation=ALL, draw=(0, 0, 3)
    )
    assert crop.conditions and crop.templates
    n, s, a, t = 144, 42, 12 * 3 * 32, len(crop.templates) + 1
    whole = tile_features(crop, Grid(), n, s, a, t)
    for rank in range(rows * cols):
        grid = Grid(rows, cols, 1, rank)
        part = tile_features(crop, grid, n, s, a, t)
        (i0, i1), (j0, j1), (r0, r1) = grid.row_tokens(n), grid.col_tokens(n), grid.msa_rows(s)
        assert {*part} == {*FEATURES, "id"}
        for name, feature in FEATURES.items():
            expected = whole[name]
            if feature.placement == TILE:
                first = slice(r0, r1) if expected.shape[0] == s else slice(i0, i1)
                expected = expected[first, j0:j1]
            elif feature.placement == ATOMS:
                expected = expected[rank * a // (rows * cols) : (rank + 1) * a // (rows * cols)]
            assert part[name].dtype == expected.dtype
            np.testing.assert_array_equal(part[name], expected, err_msg=name)


def test_padding_is_zero(samples):
    crop = crop_of(samples, "3l4q", augmentation=replace(ALL, random_depth=False))
    real, atoms = len(crop.tokens), len(crop.atoms.atom)
    features = tile_features(crop, Grid(), 144, 42, 1152, 2)
    for name, feature in FEATURES.items():
        value, placement = features[name], feature.placement
        if np.ndim(value) == 0 or placement == HOST:
            continue
        if name.startswith("template_") or name == "visibility_ids":
            value = np.swapaxes(value, 0, 1)
        padding = GAP if name == "msa" else 0
        assert feature.pad == padding and (value[atoms if placement == ATOMS else real :] == padding).all(), name
        if placement == TILE:
            assert (value[:, real:] == padding).all(), name
    assert features["num_tokens"] == real == features["token_pad_mask"].sum()
    assert features["atom_pad_mask"].sum() == atoms
    assert (features["msa_mask"][:37, :real] == 1).all() and (features["msa_mask"][37:] == 0).all()


@pytest.mark.parametrize("key", ["4hhb", "7pzb"])
def test_atoms_of_each_token(samples, key):
    """From each entry to the next; padded tokens have none."""
    crop = crop_of(samples, key)
    features = tile_features(crop, Grid(), 144, 37, 40 * 32)
    start = features["token_atom_start"]
    assert start.shape == (145,) and start.dtype == np.int32 and start[0] == 0
    assert (start[len(crop.tokens) :] == len(crop.atoms.atom)).all()
    np.testing.assert_array_equal(features["atoms_per_token"], np.diff(start))
    real = features["atom_pad_mask"] == 1
    np.testing.assert_array_equal(np.repeat(np.arange(144), np.diff(start)), features["atom_to_token"][real])


def test_distogram_against_brute_force(samples):
    crop = crop_of(samples, "7pzb", crop_size=300)
    features = whole(crop)
    center = torch.from_numpy(features["disto_center"]).double()
    target = (torch.cdist(center, center)[..., None] > torch.linspace(2, 22, 63).double()).sum(-1)
    known = torch.from_numpy(features["token_disto_mask"]).bool()
    pair = (known[:, None] & known).numpy()
    assert (features["disto_target"][..., 0] == target.numpy())[pair].mean() > 0.9999  # a distance on a boundary
    assert features["disto_target"].max() == 63
    assert (features["disto_target"][~pair] == 0).all()
    structure, first = crop.structure, np.flatnonzero(known.numpy())[0]
    atoms = np.flatnonzero(structure.atom_token == crop.tokens[first])
    names = structure.comp_atom_name[structure.ref_atom[atoms]]
    np.testing.assert_array_equal(features["disto_center"][first], structure.coords[atoms][names == b"CB"][0])


def test_a_distance_on_a_boundary_belongs_to_the_nearer_bin():
    center = np.array([[0, 0, 0], [2, 0, 0], [2.001, 0, 0], [22.001, 0, 0]], np.float32)
    target = distogram_tile(center, np.ones(4, np.float32), (0, 1), (0, 4))
    assert target[0, :, 0].tolist() == [0, 0, 1, 63]


def test_bonds_of_a_ligand(samples):
    """Haem: 43 heavy atoms and their bonds both ways, the iron's to the histidine where the entry lists it."""
    crop = crop_of(samples, "4hhb", crop_size=10_000)
    structure, features = crop.structure, whole(crop)
    haem = np.flatnonzero(structure.comp_name[structure.component] == b"HEM")[:43]
    own = features["type_bonds"][np.ix_(haem, haem)]
    np.testing.assert_array_equal(own, own.T)
    assert 2 * 46 <= np.count_nonzero(own) <= 2 * 52
    kinds = {BOND_TYPES[kind - 1] for kind in np.unique(own[own > 0])}
    assert {"single", "double"} <= kinds <= {"single", "double", "aromatic"}
    np.testing.assert_array_equal(features["token_bonds"][..., 0], features["type_bonds"] > 0)
    assert np.count_nonzero(features["type_bonds"]) == 2 * len(structure.bond_type)
    for (first, second), kind in zip(structure.atom_token[structure.bond_atoms], structure.bond_type):
        assert features["type_bonds"][first, second] == features["type_bonds"][second, first] == kind + 1


def test_of_two_bonds_between_tokens_the_later_one_counts_both_ways(samples):
    structure, *_ = read_sample(samples["4hhb"])
    first, second = structure.atom_start[[10, 50]]
    bonds = np.array([[first, second], [first + 1, second], [second + 1, first + 1]], np.int32)
    structure = replace(structure, bond_atoms=bonds, bond_type=np.array([1, 2, 3], np.uint8))
    kinds = bond_tile(structure, np.arange(100), (0, 100), (0, 100))["type_bonds"]
    assert kinds[10, 50] == kinds[50, 10] == 4 and np.count_nonzero(kinds) == 2
    assert bond_tile(structure, np.arange(20, 100), (0, 80), (0, 80))["token_bonds"].sum() == 0


def test_a_bond_from_the_last_residue_to_the_first_closes_a_chain(samples):
    structure, *_ = read_sample(samples["4hhb"])
    assert not token_features(structure, np.arange(574))["cyclic_period"].any()
    ends = structure.atom_start[[[141, 286], [287, 300]]] + np.array([0, 2])
    closed = replace(structure, bond_atoms=ends.astype(np.int32), bond_type=np.array([5, 5], np.uint8))
    period = token_features(closed, np.arange(100, 300))["cyclic_period"]
    assert period.tolist() == [0] * 41 + [146] * 146 + [0] * 13


def test_each_draw_has_its_own_crop_and_rows(samples):
    first, again, other = (crop_of(samples, "4hhb", draw=(0, 1, position)) for position in (2, 2, 3))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.rows.sampled, again.rows.sampled)
    assert not np.array_equal(first.tokens, other.tokens)
    one, another = (crop_of(samples, "4hhb", crop_size=10_000, draw=(0, 1, position)) for position in (2, 3))
    assert not np.array_equal(one.rows.sampled, another.rows.sampled)


def test_token_features(samples):
    crop = crop_of(samples, "4hhb", crop_size=10_000)
    features = whole(crop)
    structure = crop.structure
    changes = np.flatnonzero(np.diff(features["asym_id"])) + 1
    assert changes.tolist()[:4] == [141, 287, 428, 574]
    assert features["entity_id"][[0, 141, 287, 428]].tolist() == [0, 1, 0, 1]
    assert features["sym_id"][[0, 141, 287, 428]].tolist() == [0, 0, 1, 1]
    assert features["residue_index"][[0, 140, 141]].tolist() == [0, 140, 0]
    assert (features["mol_type"][:574] == 0).all() and (features["mol_type"][574:] == 3).all()
    assert set(features["method_feature"].tolist()) == {1}
    np.testing.assert_array_equal(features["res_type"].argmax(-1), structure.res_type)
    np.testing.assert_array_equal(features["msa"][0], structure.res_type)
    names = structure.comp_atom_name[structure.ref_atom]
    assert set(names[features["token_to_center_atom"][:574]]) == {b"CA"}
    glycine = features["res_type"][:, 9] == 1
    assert set(names[features["token_to_rep_atom"][:574][~glycine[:574]]]) == {b"CB"}
    np.testing.assert_array_equal(features["atom_to_token"][features["token_to_rep_atom"]], np.arange(len(structure)))
    coords = features["coords"][features["token_to_rep_atom"]]
    apart = np.diff(coords - features["disto_center"], axis=0)
    np.testing.assert_allclose(apart[features["token_disto_mask"][1:] == 1][:500], 0, atol=1e-4)
    dna = whole(crop_of(samples, "7pzb", crop_size=10_000))
    assert set(dna["mol_type"].tolist()) == {0, 1, 3}


def test_depth_of_the_alignment_is_drawn(samples):
    """Uniform from 1 to the most; without alignments, row and profile are the query alone."""
    depth = replace(Augmentation(), random_depth=True)
    crops = [crop_of(samples, "4hhb", augmentation=depth, draw=(0, 0, position)) for position in range(60)]
    depths = [len(crop.rows.sampled) for crop in crops]
    assert min(depths) >= 1 and max(depths) <= 37 and len(set(depths)) > 20 and 14 < np.mean(depths) < 24
    alone = crop_of(samples, "4hhb", augmentation=Augmentation(single_sequence=1.0))
    features = whole(alone)
    assert len(alone.rows.sampled) == 1
    np.testing.assert_array_equal(features["profile"], features["res_type"])
    often = [
        crop_of(samples, "4hhb", augmentation=Augmentation(single_sequence=0.3), draw=(0, 0, p)) for p in range(60)
    ]
    assert 8 < sum(len(crop.rows.all) == 1 for crop in often) < 30


def test_profile_is_over_the_whole_alignment(samples):
    """The mean over all rows, though the model sees a few of them; checked against a tile that holds all."""
    few, all_rows = crop_of(samples, "3l4q"), crop_of(samples, "3l4q", max_msa_rows=10**6)
    s = len(all_rows.rows.all)
    assert len(few.rows.sampled) == 37 < s == len(all_rows.rows.sampled)
    all_features, features = whole(all_rows, s), whole(few)
    expected = np.eye(33)[all_features["msa"]].mean(0)
    np.testing.assert_allclose(features["profile"], expected, atol=1e-6)
    np.testing.assert_allclose(features["deletion_mean"], all_features["deletion_value"].mean(0), atol=1e-6)
    assert features["deletion_mean"].max() > 0


def alignment(rows, deletions=None, keys=None):
    tokens = np.array(rows, np.int8)
    deletions = np.zeros(tokens.shape, np.uint8) if deletions is None else np.array(deletions, np.uint8)
    return Alignment(tokens, deletions, np.array(keys if keys else [UNPAIRED] * len(tokens)))


def test_deletions_reach_the_model():
    """A hand-made alignment: insertions arrive as pi / 2 * atan(d / 3) at their column."""
    one = alignment([[2, 3, 4], [5, GAP, 6]], [[0, 0, 0], [0, 2, 9]])
    rows, paired = msa.pair([one.keys])
    block = msa.tile(msa.Rows([msa.Segment(0, 2, np.array([1, 2]), one)], rows, rows, paired), (0, 3), (0, 3))
    assert block["msa"].tolist() == [[3, 4, GAP], [GAP, 6, GAP], [GAP] * 3]
    expected = [math.pi / 2 * math.atan(2 / 3), math.pi / 2 * math.atan(3)]
    np.testing.assert_allclose(block["deletion_value"][1, :2], expected, rtol=1e-6)
    assert block["has_deletion"].tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert block["msa_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_pairing():
    """Organisms of most chains first, the rest side by side, no sequence twice, gaps where a chain has no more."""
    rows, paired = msa.pair([np.array([-1, 7, -1, 8, 8]), np.array([-1, -1, 8, 7, 9]), np.array([-1, 7])])
    assert rows.tolist() == [[0, 0, 0], [1, 3, 1], [3, 2, -1], [4, 2, -1], [2, 1, -1], [-1, 4, -1]]
    assert paired.astype(int).tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    rows, paired = msa.pair([np.array([-1, 7, 7, -1])])
    assert rows[:, 0].tolist() == [0, 1, 2, 3] and paired[:, 0].tolist() == [True, False, False, False]


def test_copies_of_a_chain_show_the_same_sequences(samples):
    rows = crop_of(samples, "4hhb", crop_size=10_000, max_msa_rows=10**6).rows
    np.testing.assert_array_equal(rows.all[:, 0], rows.all[:, 2])
    assert 400 < (rows.paired[:, :4].all(axis=1)).sum() < len(rows.all)


def test_no_rank_builds_a_whole_pair_feature(samples):
    """Memory at N = 3072: a rank of 4 x 4 takes a sixteenth of the pair features, and no N x N array of any kind."""
    crop = crop_of(samples, "7ok9", crop_size=3072, max_msa_rows=64, augmentation=replace(ALL, random_depth=False))
    assert len(crop.tokens) == 3072
    a, peaks = Grid(4, 4).pad_atoms(len(crop.atoms.atom)), {}
    tile_features(crop, Grid(4, 4, 1, 15), 3072, 64, a)  # what a structure caches is not counted
    for grid in (Grid(), Grid(4, 4, 1, 15)):
        tracemalloc.start()
        tile_features(crop, grid, 3072, 64, a)
        peaks[str(grid)] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 8 * 3072**2 < peaks["1x1"] < 11 * 3072**2
    assert peaks["4x4"] < peaks["1x1"] / 16 + 12e6
