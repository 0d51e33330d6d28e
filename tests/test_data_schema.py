"""The schema of features is what batches are, what the planner and the benchmark make up, and what the page says."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from cpfold_train.config.compose import compose
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.schema import ATOMS, FEATURES, HOST, ON_HOST, PLAIN, REPLICATED, TILE
from cpfold_train.data.stream.batch import Augmentation, collate, make_crop
from cpfold_train.data.stream.padding import Padding
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.batch import assumed_batch
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.inputs import make_features

PADDING = Padding(side=4, rows=5, atoms=64)


@pytest.fixture(scope="module")
def crops():
    """Two crops of different sizes, with templates and conditions, of a complex with DNA and of one with ligands."""
    entries = {entry.key: entry for entry in open_shards(["data/large/*.tar", "tests/data/*.tar"])}
    found = []
    for key, size in (("7pzb", 150), ("4hhb", 131)):
        structure, alignments, _ = read_sample(entries[key])
        templates = [make_template(structure, structure, [(0, 0)])] * 2
        augmentation = Augmentation(pocket=0.8, contact=0.8)
        found.append(
            make_crop(
                structure,
                alignments,
                templates,
                crop_size=size,
                max_msa_rows=9,
                augmentation=augmentation,
                draw=(0, 0, 1),
            )
        )
    return found


@pytest.mark.parametrize("grid", [Grid(), *[Grid(2, 3, 1, rank) for rank in range(6)]], ids=lambda g: f"{g}, {g.rank}")
def test_a_batch_has_the_names_shapes_and_dtypes_of_the_schema(crops, grid):
    batch = collate(crops, grid, PADDING)
    assert {*batch} == {*FEATURES, "id"}
    n, s, a = PADDING.sizes(grid, 150, 9, max(len(crop.atoms.atom) for crop in crops))
    chains, copies, orders = (max(sizes) for sizes in zip(*(crop.symmetry.sizes for crop in crops)))
    assert min(copies, orders) > 1
    sizes = {"token": n, "sequence": s, "atom": a, "template": 2, "chain": chains, "copy": copies, "order": orders}
    for name, feature in FEATURES.items():
        value = batch[name]
        assert isinstance(value, np.ndarray if feature.placement == HOST else torch.Tensor), name
        assert str(value.dtype).removeprefix("torch.") == feature.dtype, name
        assert tuple(value.shape) == (2, *feature.shape(sizes, grid)), name


def test_placement_follows_from_the_dims():
    found = {
        placement: {n for n, f in FEATURES.items() if f.placement == placement} for placement in (TILE, ATOMS, PLAIN)
    }
    assert found[TILE] >= {"msa", "token_bonds", "disto_target"} and len(found[TILE]) == 10
    assert found[ATOMS] >= {"coords", "copy_coords", "atom_swaps"} and len(found[ATOMS]) == 13
    assert found[PLAIN] == {"sample_key", "num_tokens"}
    assert [name for name, feature in FEATURES.items() if feature.placement == HOST] == [ON_HOST]
    for name in ("asym_id", "res_type", "template_cb", "chain_copies", "frames_idx"):
        assert FEATURES[name].placement == REPLICATED


def test_planned_batches_have_all_features():
    batch = assumed_batch(compose(["crop_size=100", "batch_size=2"]), Grid(2, 3))
    assert {*batch} == {*FEATURES}
    assert batch[ON_HOST].dtype == np.int32 and batch["msa"].dtype == torch.int64


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 3, 1, 4)], ids=str)
def test_inputs_of_the_benchmark_are_of_the_schema(grid):
    made = make_features(("pair_features",), Sizes(48, 12, 384, 2), grid, torch.device("cpu"))
    assert {*made} - {*FEATURES} == {"noisy_coords", "sigmas", "times"}
    sizes = {"token": 48, "sequence": 12, "atom": 384, "template": 1, "chain": 2, "copy": 2, "order": 1}
    for name in {*made} & {*FEATURES}:
        assert str(made[name].dtype).removeprefix("torch.") == FEATURES[name].dtype, name
        assert tuple(made[name].shape) == (1, *FEATURES[name].shape(sizes, grid)), name


def test_makers_exist():
    for name, feature in FEATURES.items():
        module, function = feature.maker.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(f"cpfold_train.data.{module}"), function)), name
