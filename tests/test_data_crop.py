"""Crops: limits, what each kind must show, speed, and the stock Boltz cropper."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.stream.crop import (
    CROPS,
    INTERFACE_DISTANCE,
    contiguous_crop,
    crop_tokens,
    draw_seed,
    neighbourhood_crop,
)
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.stream.validate import check_sample
from cpfold_train.errors import DataError
from tests.synthetic import make_structure

ORACLE = Path(__file__).parent / "oracle" / "boltz_crop.py"
LENGTHS, TYPES = (150, 90, 30, 25, 1, 12), ("protein", "protein", "dna", "nonpolymer", "nonpolymer", "protein")


def crop(structure, kind, seed=0, focus=(), **limits):
    limits = {"max_tokens": 64} | limits
    return crop_tokens(structure, np.random.default_rng(seed), kinds={kind: 1.0}, focus=focus, **limits)


def atoms_of(structure, tokens):
    return int(np.diff(structure.atom_start)[tokens].sum())


@pytest.fixture(scope="module")
def made():
    structure = make_structure(LENGTHS, TYPES, interfaces=[(0, 1), (1, 3)])
    check_sample(structure, {}, [], "made0")
    return structure


@pytest.fixture(scope="module")
def real():
    return {e.key: read_sample(e)[0] for e in open_shards(["data/large/*.tar", "tests/data/*.tar"])}


@pytest.mark.parametrize("kind", CROPS)
@pytest.mark.parametrize("limits", [{"max_tokens": 64}, {"max_tokens": 200, "max_atoms": 300}])
def test_limits_order_and_whole_ligands(made, kind, limits):
    sizes = []
    for seed in range(40):
        tokens = crop(made, kind, seed, **limits)
        sizes.append((len(tokens), atoms_of(made, tokens)))
        assert (np.diff(tokens) > 0).all()
        assert sizes[-1][0] <= limits["max_tokens"]
        assert sizes[-1][1] <= limits.get("max_atoms", 10**9)
        assert (made.asym_id[tokens] == 3).sum() in (0, 25)
        np.testing.assert_array_equal(tokens, crop(made, kind, seed, **limits))
    reached = max(size[0] for size in sizes) if "max_atoms" not in limits else max(size[1] for size in sizes)
    assert reached > 0.9 * limits.get("max_atoms", limits["max_tokens"])


@pytest.mark.parametrize("kind", CROPS)
def test_a_complex_within_the_limits_is_whole(made, kind):
    np.testing.assert_array_equal(crop(made, kind, max_tokens=308, max_atoms=10**5), np.arange(308))
    assert len(crop(made, kind, max_tokens=308, max_atoms=atoms_of(made, np.arange(308)) - 1)) < 308


def test_spatial_is_the_nearest_tokens(made):
    """Without ligands: exactly the 64 resolved tokens that are nearest to one of them."""
    structure = make_structure((150, 90), ("protein", "protein"))
    center, known = structure.center
    for seed in range(5):
        tokens = crop(structure, "spatial", seed)
        assert len(tokens) == 64
        assert known[tokens].all()
        outside = np.setdiff1d(np.flatnonzero(known), tokens)
        distance = np.linalg.norm(center[:, None] - center[tokens], axis=-1)
        assert any(distance[tokens, k].max() <= distance[outside, k].min() for k in range(64))


def test_focus(real):
    """A crop starts in the chain, or where the two chains meet."""
    structure = real["4hhb"]
    center, known = structure.center
    for seed in range(20):
        rng = np.random.default_rng(seed)
        allowed = np.arange(len(structure)) % 2 == 0
        assert structure.asym_id[draw_seed(structure, rng, (2,), allowed)] == 2
        token = draw_seed(structure, rng, (0, 3), allowed)
        assert allowed[token]
        here = structure.asym_id[token]
        assert here in (0, 3)
        others = known & (structure.asym_id == 3 - here)
        assert np.linalg.norm(center[others] - center[token], axis=1).min() < INTERFACE_DISTANCE
        for kind in ("spatial", "interface"):
            assert {0, 3} <= set(structure.asym_id[crop(structure, kind, seed, (0, 3), max_tokens=200)])
        assert 1 in structure.asym_id[crop(structure, "contiguous", seed, (1,), max_tokens=20)]


def test_interface_crops_show_chains_in_contact(real):
    structure = real["4hhb"]
    for seed in range(10):
        tokens = crop(structure, "interface", seed, max_tokens=200)
        center, asym_id = structure.center[0][tokens], structure.asym_id[tokens]
        apart = np.linalg.norm(center[:, None] - center, axis=-1)[asym_id[:, None] != asym_id]
        assert apart.size
        assert apart.min() < INTERFACE_DISTANCE


def test_a_focus_without_coordinates_is_no_obstacle():
    structure = make_structure((50, 40), ("protein", "protein"), interfaces=[(0, 1)])
    structure.resolved[structure.atom_start[50] :] = False
    for kind in CROPS:
        assert len(crop(structure, kind, focus=(1,), max_tokens=20))
        assert len(crop(structure, kind, focus=(0, 1), max_tokens=20))


def test_contiguous_is_one_stretch_a_chain(made):
    for seed in range(30):
        tokens = contiguous_crop(made, 100, 10**6, np.random.default_rng(seed))
        for chain in np.unique(made.asym_id[tokens]):
            assert (np.diff(tokens[made.asym_id[tokens] == chain]) == 1).all()


def test_kinds_are_drawn_by_their_weights(made):
    known, kinds = made.center[1], {"contiguous": 3, "spatial": 1}
    crops = [crop_tokens(made, np.random.default_rng(s), kinds=kinds, max_tokens=64) for s in range(200)]
    contiguous = [not known[tokens].all() for tokens in crops]
    assert 120 < sum(contiguous) < 170, "a spatial crop has resolved tokens alone"


def test_nothing_fits():
    structure = make_structure((50,), ("nonpolymer",), unresolved=0)
    for kind in CROPS:
        with pytest.raises(DataError, match=r"\b40 tokens"):
            crop(structure, kind, max_tokens=40)


def test_small_crops_are_not_lost_to_large_ligands(made):
    for kind in CROPS:
        for seed in range(40):
            assert len(crop(made, kind, seed, focus=(3,), max_tokens=20))


@pytest.mark.parametrize("kind", CROPS)
def test_ten_thousand_tokens(kind):
    """What took the square of their number would not end within the time that a test has."""
    structure = make_structure((4000, 4000, 1990, 10), ("protein", "protein", "rna", "nonpolymer"), interfaces=[(0, 1)])
    assert 0 < len(crop(structure, kind, max_tokens=6144, max_atoms=40_000)) <= 6144


def test_neighbourhood_equals_the_package(real, tmp_path):
    """The same seed token and neighbourhood size give the same tokens as the stock package's cropper."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    rng = np.random.default_rng(0)
    for key, limits in (("4hhb", (200, 900)), ("7pzb", (150, 10**6)), ("4jsv", (512, 4608))):
        structure = real[key]
        center, known = structure.center
        fields = ["token_idx", "asym_id", "res_idx", "atom_num"]
        tokens = np.zeros(
            len(structure),
            [(name, np.int64) for name in fields] + [("resolved_mask", bool), ("center_coords", np.float32, 3)],
        )
        columns = (np.arange(len(structure)), structure.asym_id, structure.res_index, np.diff(structure.atom_start))
        for name, values in zip(fields, columns):
            tokens[name] = values
        tokens["resolved_mask"], tokens["center_coords"] = known, center
        seeds = rng.choice(np.flatnonzero(known), 21)
        cases = np.array([(seed, size, *limits) for seed, size in zip(seeds, range(0, 42, 2))])
        np.savez(tmp_path / "in.npz", tokens=tokens, cases=cases)
        subprocess.run([python, str(ORACLE), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")], check=True)
        expected = np.load(tmp_path / "out.npz")
        for k, (seed, size, max_tokens, max_atoms) in enumerate(cases.tolist()):
            ours = neighbourhood_crop(structure, [seed], size, max_tokens, max_atoms)
            np.testing.assert_array_equal(ours, expected[f"crop_{k}"])
