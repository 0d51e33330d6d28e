"""Which sample stands where: weights against a plain reading of the formula, laps, and several data sets."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from cpfold_train.data.stream.sampling import Pool, Source, Stream, open_source, weigh
from cpfold_train.data.stream.shards import open_shards
from cpfold_train.errors import ConfigError
from cpfold_train.vocabulary import MOL_TYPES

SHARDS = ("data/shards/*.tar", "tests/data/*.tar", "data/large/*.tar")


def index_of(samples, seed=0, chains_a_sample=(1, 6), clusters=20):
    """The columns of an index of random samples."""
    rng = np.random.default_rng(seed)
    count = rng.integers(*chains_a_sample, samples)
    chains = int(count.sum())
    pairs = [[(i, j) for i in range(n) for j in range(i + 1, n) if (i + j) % 2] for n in count.tolist()]
    return {
        "key": np.array([f"s{seed}-{i}" for i in range(samples)]),
        "offset": np.full((samples, 3), 512),
        "size": np.full((samples, 3), 100),
        "chain_start": np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
        "chain_type": rng.integers(0, 4, chains).astype(np.int8),
        "chain_observed": rng.integers(0, 5, chains).astype(np.int32),
        "cluster": np.array([f"c{i}" for i in range(clusters)]),
        "chain_cluster": rng.integers(0, clusters, chains).astype(np.int32),
        "interface_start": np.cumsum([0, *map(len, pairs)]).astype(np.int32),
        "interface": np.array([pair for own in pairs for pair in own], dtype=np.int16).reshape(-1, 2),
    }


def expected_weights(samples):
    """AlphaFold 3's formula, target by target. ``samples``: (chains, interfaces) of each, chains as dicts."""
    targets = []
    for sample, (chains, interfaces) in enumerate(samples):
        for chain in range(len(chains)):
            targets.append((sample, (chain, -1)))
        for pair in interfaces:
            targets.append((sample, tuple(pair)))
    kept, size = [], defaultdict(int)
    for sample, shown in targets:
        own = [samples[sample][0][chain] for chain in shown if chain >= 0]
        if all(chain["observed"] for chain in own):
            cluster = tuple(sorted(chain["cluster"] for chain in own))
            size[cluster] += 1
            kept.append((sample, shown, cluster, [chain["type"] for chain in own]))
    weights = {}
    for sample, shown, cluster, types in kept:
        alpha = sum(1 if kind == "nonpolymer" else 3 for kind in types)
        weights[sample, shown] = (0.5 if len(types) == 1 else 1.0) / size[cluster] * alpha
    return weights


def weights_of(targets):
    weight = np.diff(targets.cumulative, prepend=0)
    return {(s, tuple(c)): w for s, c, w in zip(targets.sample.tolist(), targets.chains.tolist(), weight.tolist())}


def same_weights(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(ours[target] == pytest.approx(expected[target], rel=1e-9) for target in ours)


def test_weights_of_real_samples():
    pool = open_source(Source(SHARDS, sampling="weighted"))
    expected = expected_weights([(entry.chains, entry.interfaces) for entry in open_shards(SHARDS)])
    assert len(expected) > 500
    same_weights(weights_of(pool.targets), expected)


def test_weights_of_random_samples():
    """Unobserved chains have no weight and do not enlarge their cluster; clusters reach across shards."""
    indices = [index_of(30, 0), index_of(20, 1, clusters=7)]
    samples = []
    for index in indices:
        for row in range(len(index["key"])):
            chains = [
                {
                    "type": MOL_TYPES[index["chain_type"][chain]],
                    "observed": index["chain_observed"][chain],
                    "cluster": index["cluster"][index["chain_cluster"][chain]],
                }
                for chain in range(*index["chain_start"][row : row + 2])
            ]
            samples.append((chains, index["interface"][slice(*index["interface_start"][row : row + 2])].tolist()))
    same_weights(weights_of(weigh(indices)), expected_weights(samples))


def pool_of(samples, seed=0, sampling="each", weight=1.0):
    index = index_of(samples, seed)
    targets = weigh([index]) if sampling == "weighted" else None
    return Pool([(f"{seed}.tar", index)], np.array([0, samples]), targets, Source((), weight, sampling))


def test_draws_follow_the_weights():
    stream = Stream((pool_of(10, sampling="weighted"),), 20_000, 3, True)
    drawn = Counter()
    for position in range(20_000):
        draw = stream.draw(0, position)
        drawn[int(draw.location.key.split("-")[1]), (*draw.focus, -1)[:2]] += 1
    weights = weights_of(stream.pools[0].targets)
    total = sum(weights.values())
    assert drawn.keys() <= weights.keys()
    for target, weight in weights.items():
        expected = 20_000 * weight / total
        assert abs(drawn[target] - expected) < 5 * np.sqrt(expected) + 1


def test_each_sample_once_a_lap():
    """Epochs of 7 positions go on through 10 samples: none comes again before all have come."""
    stream = Stream((pool_of(10),), 7, 0, True)
    keys = [stream.draw(epoch, position).location.key for epoch in range(10) for position in range(7)]
    laps = [keys[start : start + 10] for start in range(0, 70, 10)]
    assert all(len(set(lap)) == 10 for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 7
    assert stream.draw(2, 9).location == stream.draw(3, 2).location, (
        "past the end of an epoch stands the next one's start"
    )
    assert keys != [Stream((pool_of(10),), 7, 1, True).draw(e, p).location.key for e in range(10) for p in range(7)]


def test_sets_are_drawn_by_weight_and_each_in_its_own_order():
    stream = Stream((pool_of(40, 0, weight=3), pool_of(25, 1, weight=1)), 50, 0, True)
    keys = [stream.draw(epoch, position).location.key for epoch in range(40) for position in range(50)]
    of = [[key for key in keys if key.startswith(f"s{number}-")] for number in (0, 1)]
    assert abs(len(of[0]) - 1500) < 100
    for own, size in zip(of, (40, 25)):
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size
    again = Stream((pool_of(40, 0, weight=3), pool_of(25, 1, weight=1)), 50, 0, True)
    assert again.draw(7, 12) == stream.draw(7, 12), "without the draws before it"


def test_attempts():
    """Another sample of the same set, the same whenever asked; without shuffling the next one."""
    for sampling in ("each", "weighted"):
        stream = Stream((pool_of(40, 0, sampling), pool_of(40, 1, sampling)), 40, 0, True)
        attempts = [stream.draw(1, 5, attempt) for attempt in range(8)]
        assert len({draw.location.key for draw in attempts}) > 4
        assert len({draw.location.tar for draw in attempts}) == 1
        assert attempts == [stream.draw(1, 5, attempt) for attempt in range(8)]
    fixed = Stream((pool_of(10),), 10, 0, False)
    assert [fixed.draw(3, 8, attempt).location.key for attempt in range(3)] == ["s0-8", "s0-9", "s0-0"]


def test_sets_without_a_chain_to_draw(monkeypatch):
    index = index_of(3)
    index["chain_observed"][:] = 0
    monkeypatch.setattr("cpfold_train.data.stream.sampling.read_indices", lambda shards: [("x.tar", index)])
    with pytest.raises(ConfigError, match=r"x\.tar .*data\.sampling=each"):
        open_source(Source(("x.tar",), sampling="weighted"))


def test_two_hundred_thousand_samples():
    """What went through all of them for each draw would not end within the time that a test has."""
    index = index_of(200_000, clusters=30_000)
    targets = weigh([index])
    pool = Pool([("x.tar", index)], np.array([0, 200_000]), targets, Source((), sampling="weighted"))
    each = pool._replace(targets=None)
    stream = Stream((pool, each), 200_000, 0, True)
    assert len({stream.draw(3, position)[0].key for position in range(1000)}) > 900
