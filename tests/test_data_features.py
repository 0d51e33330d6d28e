"""Crops, MSA assembly and the features of a tile, against brute force and across grids."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from cpfold_train.data import msa
from cpfold_train.data.alignment import UNPAIRED, Alignment
from cpfold_train.data.crop import INTERFACE_DISTANCE, contiguous_crop, spatial_crop
from cpfold_train.data.features import make_crop, pair_features, tile_features
from cpfold_train.data.loader import PLACEMENTS
from cpfold_train.data.residues import GAP
from cpfold_train.data.shards import open_shards, read_sample
from cpfold_train.parallel.grid import Grid

GRIDS = [(1, 2), (2, 1), (2, 2), (2, 3), (3, 3)]


@pytest.fixture(scope="module")
def samples():
    entries = open_shards(["data/large/*.tar", "tests/data/*.tar"])
    return {entry.key: entry for entry in entries}


def crop_of(samples, key, **settings):
    settings = {"crop_size": 131, "max_msa_rows": 37, "draw": (0, 0, 0)} | settings
    return make_crop(*read_sample(samples[key]), **settings)


@pytest.mark.parametrize("key", ["4hhb", "7pzb", "3l4q"])
@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_tiles_are_parts_of_the_whole(samples, key, rows, cols):
    """The union of all ranks' tiles is what a single rank has, bit for bit."""
    crop = crop_of(samples, key)
    n, s = 144, 42
    whole = tile_features(crop, Grid(), n, s)
    for rank in range(rows * cols):
        grid = Grid(rows, cols, 1, rank)
        part = tile_features(crop, grid, n, s)
        (i0, i1), (j0, j1), (r0, r1) = grid.row_tokens(n), grid.col_tokens(n), grid.msa_rows(s)
        for name, placement in PLACEMENTS.items():
            expected = whole[name]
            if placement == "tile":
                first = slice(r0, r1) if expected.shape[0] == s else slice(i0, i1)
                expected = expected[first, j0:j1]
            assert part[name].dtype == expected.dtype
            np.testing.assert_array_equal(part[name], expected, err_msg=name)


def test_padding_is_zero(samples):
    crop = crop_of(samples, "3l4q")
    real = len(crop.tokens)
    features = tile_features(crop, Grid(), 144, 42)
    for name, placement in PLACEMENTS.items():
        value = features[name]
        if np.ndim(value) == 0:
            continue
        padding = GAP if name == "msa" else 0
        assert (value[real:] == padding).all(), name
        if placement == "tile":
            assert (value[:, real:] == padding).all(), name
    assert features["num_tokens"] == real == features["token_pad_mask"].sum()
    assert (features["msa_mask"][:37, :real] == 1).all() and (features["msa_mask"][37:] == 0).all()


def test_distogram_against_brute_force(samples):
    crop = crop_of(samples, "7pzb", crop_size=300)
    n = len(crop.tokens)
    features = tile_features(crop, Grid(), n, 37)
    center = torch.from_numpy(features["disto_center"]).double()
    target = (torch.cdist(center, center)[..., None] > torch.linspace(2, 22, 63).double()).sum(-1)
    known = torch.from_numpy(features["token_disto_mask"]).bool()
    pair = (known[:, None] & known).numpy()
    assert (features["disto_target"][..., 0] == target.numpy())[pair].mean() > 0.9999  # a distance on a boundary
    assert features["disto_target"].max() == 63
    assert (features["disto_target"][~pair] == 0).all()
    structure = crop.structure
    first = crop.tokens[np.flatnonzero(known.numpy())[0]]
    atoms = slice(structure.atom_start[first], structure.atom_start[first + 1])
    wanted = structure.coords[atoms][structure.atom_name[atoms] == b"CB"][0]
    np.testing.assert_array_equal(features["disto_center"][np.flatnonzero(known.numpy())[0]], wanted)


def test_a_distance_on_a_boundary_belongs_to_the_nearer_bin():
    center = np.array([[0, 0, 0], [2, 0, 0], [2.001, 0, 0], [22.001, 0, 0]], np.float32)
    target = pair_features(center, np.ones(4, np.float32), (0, 1), (0, 4))["disto_target"]
    assert target[0, :, 0].tolist() == [0, 0, 1, 63]


def test_each_draw_has_its_own_crop_and_rows(samples):
    first, again, other = (crop_of(samples, "4hhb", draw=(0, 1, position)) for position in (2, 2, 3))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.rows.sampled, again.rows.sampled)
    assert not np.array_equal(first.tokens, other.tokens)
    whole, another = (crop_of(samples, "4hhb", crop_size=10_000, draw=(0, 1, position)) for position in (2, 3))
    assert not np.array_equal(whole.rows.sampled, another.rows.sampled)


def test_token_features(samples):
    crop = crop_of(samples, "4hhb", crop_size=10_000)
    features = tile_features(crop, Grid(), 574, 37)
    changes = np.flatnonzero(np.diff(features["asym_id"])) + 1
    assert changes.tolist() == [141, 287, 428]
    assert features["entity_id"][[0, 141, 287, 428]].tolist() == [0, 1, 0, 1]
    assert features["sym_id"][[0, 141, 287, 428]].tolist() == [0, 0, 1, 1]
    assert features["residue_index"][[0, 140, 141]].tolist() == [0, 140, 0]
    assert features["method_feature"].tolist() == [1] * 574
    np.testing.assert_array_equal(features["res_type"].argmax(-1), crop.structure.res_type)
    np.testing.assert_array_equal(features["msa"][0], crop.structure.res_type)
    dna = tile_features(crop_of(samples, "7pzb", crop_size=10_000), Grid(), 554, 37)
    assert set(dna["mol_type"].tolist()) == {0, 1}


def test_profile_is_over_the_whole_alignment(samples):
    """The mean over all rows, though the model sees a few of them; checked against a tile that holds all."""
    few, all_rows = crop_of(samples, "3l4q"), crop_of(samples, "3l4q", max_msa_rows=10**6)
    s, n = len(all_rows.rows.all), len(few.tokens)
    assert len(few.rows.sampled) == 37 < s == len(all_rows.rows.sampled)
    whole = tile_features(all_rows, Grid(), n, s)
    expected = np.eye(33)[whole["msa"]].mean(0)
    features = tile_features(few, Grid(), n, 37)
    np.testing.assert_allclose(features["profile"], expected, atol=1e-6)
    np.testing.assert_allclose(features["deletion_mean"], whole["deletion_value"].mean(0), atol=1e-6)
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
    assert 400 < (rows.paired.all(axis=1)).sum() < len(rows.all)


def test_spatial_crop_is_the_nearest_tokens():
    rng = np.random.default_rng(0)
    center, resolved = rng.normal(size=(400, 3)) * 20, rng.random(400) < 0.9
    tokens = spatial_crop(center, resolved, np.zeros(400, int), 60, 0.0, np.random.default_rng(3))
    assert len(tokens) == 60 and (np.diff(tokens) > 0).all() and resolved[tokens].all()
    distance = np.linalg.norm(center[:, None] - center[tokens], axis=-1)
    outside = np.setdiff1d(np.flatnonzero(resolved), tokens)
    nearest = [distance[tokens, k].max() <= distance[outside, k].min() for k in range(60)]
    assert sum(nearest) >= 1


def test_interface_crops_have_two_chains(samples):
    structure, _ = read_sample(samples["4hhb"])
    for seed in range(10):
        rng = np.random.default_rng(seed)
        tokens = spatial_crop(structure.center, structure.resolved, structure.asym_id, 60, 1.0, rng)
        center, asym_id = structure.center[tokens], structure.asym_id[tokens]
        apart = np.linalg.norm(center[:, None] - center, axis=-1)[asym_id[:, None] != asym_id]
        assert apart.size and apart.min() < INTERFACE_DISTANCE


def test_contiguous_crop():
    asym_id = np.repeat([0, 1, 2], [50, 30, 20])
    for seed in range(30):
        tokens = contiguous_crop(asym_id, 40, np.random.default_rng(seed))
        assert len(tokens) == 40 and (np.diff(tokens) > 0).all()
        for chain in np.unique(asym_id[tokens]):
            assert (np.diff(tokens[asym_id[tokens] == chain]) == 1).all()


def test_no_rank_builds_a_whole_pair_feature(samples):
    """At N = 3072 on 8 x 8 ranks an N x N int64 would be 75 MB; the whole tile takes far less."""
    crop = crop_of(samples, "7ok9", crop_size=3072, max_msa_rows=64)
    assert len(crop.tokens) == 3072
    tracemalloc.start()
    tile_features(crop, Grid(8, 8, 1, 63), 3072, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6
