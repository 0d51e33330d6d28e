"""Crops show what was drawn, hold resolved atoms and are made wherever they can be; draws follow their weights."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from cpfold_train.data.stream.crop import (
    CROPS,
    contiguous_crop,
    crop_tokens,
    draw_focus,
    draw_seeds,
    neighbourhood_crop,
)
from cpfold_train.data.stream.sampling import Source, Stream, open_source
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.errors import DataError
from tests.synthetic import make_structure

KINDS = {kind: {kind: 1.0} for kind in CROPS} | {"mixture": {"contiguous": 0.2, "spatial": 0.4, "interface": 0.4}}
SMALL, LARGE = ("data/shards/*.tar", "tests/data/*.tar"), ("data/large/*.tar",)
SEED = 1000


@cache
def weighted(patterns=SMALL + LARGE):
    return Stream((open_source(Source(patterns, sampling="weighted")),), 20_000, SEED, True)


READ = {}


def structure_at(location):
    """A sample's structure, read once, and tokens and atoms of the smallest resolved residue of each of its chains."""
    key = (location.tar, location.key)
    if key not in READ:
        structure = read_sample(location)[0]
        READ[key] = structure, smallest_residues(structure)
    return READ[key]


def smallest_residues(structure):
    residues, least = {}, {}
    for token, key in enumerate(zip(structure.asym_id.tolist(), structure.res_index.tolist())):
        residues.setdefault(key, []).append(token)
    for (chain, _), tokens in residues.items():
        start, stop = structure.atom_start[[tokens[0], tokens[-1] + 1]]
        if structure.resolved[start:stop].any():
            size = (len(tokens), int(stop - start))
            least[chain] = min(least.get(chain, size), size)
    return least


def wrong_with(location, focus, tokens, max_tokens, max_atoms):
    """What is wrong with a crop, or with none (None), for what was drawn."""
    structure, least = structure_at(location)

    def fit(*chains):
        return all(sum(least[c][k] for c in chains) <= limit for k, limit in enumerate((max_tokens, max_atoms)))

    possible = [chain for chain in focus if chain in least and fit(chain)]
    if tokens is None:
        return "refused" if any(fit(chain) for chain in least) else ""
    atoms = np.concatenate([np.arange(*structure.atom_start[token : token + 2]) for token in tokens.tolist()])
    if len(tokens) > max_tokens or len(atoms) > max_atoms:
        return "too large"
    shown = set(structure.asym_id[structure.atom_token[atoms[structure.resolved[atoms]]]].tolist())
    if not shown:
        return "nothing resolved"
    if possible and not shown & set(possible):
        return "nothing of what was drawn"
    if len(possible) == 2 and fit(*possible) and not shown >= set(possible):
        return "one chain of two"
    return ""


def draws_with_faults(stream, kind, max_tokens, max_atoms, count):
    """How many of the first crops of a stream have what fault."""
    faults = {}
    for position in range(count):
        draw = stream.draw(0, position)
        structure, _ = structure_at(draw.location)
        limit = 10**9 if max_atoms is None else max_atoms
        try:
            tokens = crop_tokens(
                structure,
                np.random.default_rng(position),
                max_tokens=max_tokens,
                max_atoms=max_atoms,
                kinds=KINDS[kind],
                focus=draw.focus if position % 5 else (),
            )
        except DataError:
            tokens = None
        if fault := wrong_with(draw.location, draw.focus if position % 5 else (), tokens, max_tokens, limit):
            faults[fault] = faults.get(fault, 0) + 1
    return faults


@pytest.mark.parametrize("kind", KINDS)
def test_crops_show_what_was_drawn(kind):
    """Three sizes, the last with hardly more atoms than one residue has; a fifth is drawn without a chain."""
    for limits in ((64, None), (96, 300), (256, 700), (64, 24)):
        assert draws_with_faults(weighted(SMALL), kind, *limits, 80) == {}, limits


@pytest.mark.slow
@pytest.mark.parametrize("atoms_a_token", [None, 9, 1])
@pytest.mark.parametrize("size", [64, 96, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_crops(kind, size, atoms_a_token):
    most = atoms_a_token and atoms_a_token * size
    assert draws_with_faults(weighted(SMALL), kind, size, most, 20_000) == {}
    assert draws_with_faults(weighted(LARGE), kind, size, most, 1000) == {}


def unlikely(counts, expected, z=4.5):
    """Whether counts differ from what is expected by more than chance (chi-square; Wilson and Hilferty's bound)."""
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert counts.sum() == pytest.approx(expected.sum())
    free = len(counts) - 1 - (expected[-1] == 0)
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-12)).sum()
    return statistic > free * (1 - 2 / (9 * free) + z * np.sqrt(2 / (9 * free))) ** 3


def test_draws_of_real_shards_follow_their_weights():
    stream = weighted()
    targets = stream.pools[0].targets
    first = np.cumsum([0] + [len(index["key"]) for _, index in stream.pools[0].shards])[:-1]
    number = {
        (tar, key): int(start) + i
        for start, (tar, index) in zip(first, stream.pools[0].shards)
        for i, key in enumerate(index["key"].tolist())
    }
    row = {(s, tuple(c)): i for i, (s, c) in enumerate(zip(targets.sample.tolist(), targets.chains.tolist()))}
    counts = np.zeros(len(row))
    for position in range(20_000):
        draw = stream.draw(0, position)
        counts[row[number[draw.location.tar, draw.location.key], (*draw.focus, -1)[:2]]] += 1
    weight = np.diff(targets.cumulative, prepend=0)
    expected = 20_000 * weight / weight.sum()
    assert not unlikely(counts, expected)
    assert unlikely(counts, np.full(len(row), 20_000 / len(row))), "the test tells weights apart"


def test_starts_are_uniform():
    """In the drawn chain over its resolved tokens; where nothing is drawn over the interfaces."""
    structure = make_structure((150, 90, 40), ("protein", "protein", "dna"), interfaces=[(0, 1), (1, 2), (0, 2)])
    known, rng = structure.center[1], np.random.default_rng(0)
    chain = structure.asym_id == 1
    seeds = [draw_seeds(structure, rng, (1,), (1,), 64, 10**6) for _ in range(4000)]
    counts = np.bincount([seed for (seed,) in seeds], minlength=len(structure))
    assert not unlikely(counts, 4000 * (known & chain) / (known & chain).sum())
    drawn = [draw_focus(structure, rng) for _ in range(3000)]
    assert not unlikely(np.array([drawn.count(pair) for pair in set(drawn)]), np.full(3, 1000.0))


def test_the_other_chain_changes_nothing_where_the_walk_comes_to_it():
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == "4hhb")
    structure = read_sample(entry)[0]
    rng, same, other = np.random.default_rng(0), 0, 0
    for _ in range(60):
        first, second = draw_seeds(structure, rng, (0, 1), (0, 1), 96, 10**6)
        alone, both = (neighbourhood_crop(structure, seeds, 20, 96, 10**6) for seeds in ([first], [first, second]))
        if second in alone:
            np.testing.assert_array_equal(alone, both)
            same += 1
        else:
            assert {0, 1} <= set(structure.asym_id[both].tolist())
            other += 1
    assert same > 10
    assert other > 0


def test_an_end_that_alone_is_resolved():
    """Only the last residue is resolved, and few atoms fit: a shorter stretch at the end shows it."""
    structure = make_structure((80, 60), ("protein", "protein"), unresolved=1.0)
    structure.resolved[structure.atom_start[79] : structure.atom_start[80]] = True
    for seed in range(50):
        assert 79 in contiguous_crop(structure, 64, 12, np.random.default_rng(seed), (1,))


def test_a_chain_without_center_atoms():
    """A trace of phosphates: the crop starts at one of them."""
    structure = make_structure((80, 60), ("protein", "rna"))
    structure.resolved[structure.atom_start[80:140]] = False
    for kind in CROPS:
        for seed in range(10):
            tokens = crop_tokens(
                structure, np.random.default_rng(seed), max_tokens=32, max_atoms=100, kinds=KINDS[kind], focus=(1,)
            )
            assert (tokens >= 80).any()


@pytest.mark.parametrize("kind", ["interface", "neighbourhood"])
def test_a_partner_as_large_as_the_crop(kind):
    """Where both chains of an interface do not fit, the crop shows the one that was drawn."""
    structure = make_structure((80, 60), ("protein", "nonpolymer"), unresolved=0, interfaces=[(0, 1)])
    for chain in (0, 1):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            tokens = crop_tokens(structure, rng, max_tokens=60, kinds=KINDS[kind], focus=(chain,))
            assert chain in structure.asym_id[tokens]
