"""Pockets and contacts that are given away: what is said is true, and how often it is said."""

import numpy as np
import pytest

from cpfold_train.data.features.atoms import crop_atoms
from cpfold_train.data.features.conditioning import (
    BINDER_TO_POCKET,
    CONTACT,
    CUTOFFS,
    POCKET_TO_BINDER,
    UNSELECTED,
    UNSPECIFIED,
    Condition,
    conditioning_tile,
    draw_conditions,
)
from cpfold_train.data.stream.shards import open_shards, read_sample


@pytest.fixture(scope="module")
def structures():
    return {entry.key: read_sample(entry)[0] for entry in open_shards(["tests/data/*.tar"])}


def draw(structure, tokens, pocket=0.0, contact=0.0, seed=0):
    return draw_conditions(
        structure, tokens, crop_atoms(structure, tokens), pocket, contact, np.random.default_rng(seed)
    )


def apart(structure, first, second):
    """Distance of the nearest resolved atoms of two tokens, by all pairs."""
    sides = [structure.coords[structure.resolved & (structure.atom_token == token)] for token in (first, second)]
    if not all(map(len, sides)):
        return np.inf
    return np.linalg.norm(sides[0][:, None].astype(np.float64) - sides[1], axis=-1).min()


@pytest.mark.parametrize("key", ["4hhb", "7pzb"])
def test_pockets_are_near_their_binders(structures, key):
    structure = structures[key]
    for seed in range(4):
        tokens = np.arange(seed * 20, len(structure))
        conditions = draw(structure, tokens, pocket=0.99, seed=seed)
        assert conditions
        for to_pocket, to_binder in zip(conditions[::2], conditions[1::2]):
            assert (to_pocket.kind, to_binder.kind) == (BINDER_TO_POCKET, POCKET_TO_BINDER)
            assert to_pocket.rows is to_binder.columns and to_pocket.columns is to_binder.rows
            assert CUTOFFS[0] <= to_pocket.threshold == to_binder.threshold <= CUTOFFS[1]
            binder, pocket = tokens[to_pocket.rows], tokens[to_pocket.columns]
            (asym_id,) = set(structure.asym_id[binder].tolist())
            assert (structure.asym_id[tokens] == asym_id).sum() == len(binder)
            assert not structure.polymer[binder].any() and structure.polymer[pocket].all()
            for token in pocket:
                assert min(apart(structure, token, atom) for atom in binder) < to_pocket.threshold


def test_without_ligands_a_chain_is_the_binder(structures):
    structure = structures["7pzb"]
    tokens = np.flatnonzero(structure.polymer)
    conditions = draw(structure, tokens, pocket=0.9)
    assert conditions and structure.polymer[tokens[conditions[0].rows]].all()


@pytest.mark.parametrize("tokens", ["all", "one chain"])
def test_contacts_are_contacts(structures, tokens):
    structure = structures["4hhb"]
    chosen = np.arange(len(structure)) if tokens == "all" else np.arange(150, 280)
    found = [condition for seed in range(8) for condition in draw(structure, chosen, contact=0.8, seed=seed)]
    assert len(found) > 20
    for one_way, back in zip(found[::2], found[1::2]):
        assert one_way.kind == back.kind == CONTACT and one_way.rows.tolist() == back.columns.tolist()
        first, second = int(chosen[one_way.rows[0]]), int(chosen[one_way.columns[0]])
        assert apart(structure, first, second) < one_way.threshold
        if tokens == "all":
            assert structure.asym_id[first] != structure.asym_id[second]
        else:
            assert abs(first - second) > 8


def test_each_contact_is_as_likely(structures):
    """Of the pairs below the threshold that was drawn, by all distances, each is drawn as often."""
    structure, chosen = structures["4hhb"], np.arange(150, 180)
    distance = np.full((30, 30), np.inf)
    for i in range(30):
        for j in range(i):
            if i - j > 8:
                distance[i, j] = distance[j, i] = apart(structure, chosen[i], chosen[j])
    drawn = [condition for seed in range(1500) for condition in draw(structure, chosen, contact=0.5, seed=seed)[::2]]
    expected, observed = np.zeros_like(distance), np.zeros_like(distance)
    for condition in drawn:
        below = distance < condition.threshold
        expected += below / below.sum()
        observed[condition.rows[0], condition.columns[0]] += 1
    far = expected > 1
    deviation = ((observed - expected)[far] ** 2 / expected[far]).mean()
    assert far.sum() > 100 and 0.7 < deviation < 1.3


def test_how_often(structures):
    """After each pocket and contact another one follows with the same probability, so their number is geometric."""
    structure = structures["4hhb"]
    tokens = np.arange(len(structure))
    counts = {"pocket": [], "contact": []}
    for seed in range(400):
        drawn = draw(structure, tokens, pocket=0.3, contact=0.3, seed=seed)
        contacts = sum(condition.kind == CONTACT for condition in drawn) // 2
        counts["contact"].append(contacts)
        counts["pocket"].append(len(drawn) // 2 - contacts)
    for number in counts.values():
        number = np.array(number)
        assert abs((number > 0).mean() - 0.3) < 0.06 and abs((number > 1).mean() - 0.09) < 0.04
    assert draw(structure, tokens) == []


def test_tile():
    rows, columns = np.array([1, 5]), np.array([2])
    conditions = [
        Condition(rows, columns, BINDER_TO_POCKET, 6.0),
        Condition(columns, rows, POCKET_TO_BINDER, 6.0),
        Condition(np.array([5]), columns, CONTACT, 9.0),
    ]
    tile = conditioning_tile(conditions, 7, (0, 8), (0, 8))
    expected = np.full((8, 8), UNSELECTED)
    expected[7], expected[:, 7] = UNSPECIFIED, UNSPECIFIED
    expected[1, 2], expected[2, [1, 5]], expected[5, 2] = BINDER_TO_POCKET, POCKET_TO_BINDER, CONTACT
    np.testing.assert_array_equal(tile["contact_conditioning"], expected)
    assert tile["contact_threshold"][[1, 5, 2, 0], [2, 2, 5, 0]].tolist() == [6, 9, 6, 0]
    nothing = conditioning_tile([], 7, (0, 8), (0, 8))
    assert not nothing["contact_conditioning"].any() and not nothing["contact_threshold"].any()
