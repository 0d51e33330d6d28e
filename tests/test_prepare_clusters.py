"""Clusters of entities, and the split by them."""

import hashlib
import json
import os

import numpy as np
import pytest

from cpfold_train.data.prepare import clusters as module
from cpfold_train.data.prepare.clusters import entity_clusters, greedy_clusters
from cpfold_train.data.prepare.convert import Conversion
from cpfold_train.data.prepare.splits import shared_clusters, split
from cpfold_train.errors import ConfigError, DataError

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def protein(seed, length=120):
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), length))


def mutated(sequence, fraction, seed=0):
    """Another residue at exactly this fraction of the positions."""
    rng = np.random.default_rng(seed)
    letters = list(sequence)
    for position in rng.choice(len(letters), round(fraction * len(letters)), replace=False):
        letters[position] = rng.choice([letter for letter in LETTERS if letter != letters[position]])
    return "".join(letters)


def entry(key, *entities, date=None):
    """An entry with an entity of each (type, sequence); chains are A, B, ..."""
    described = [
        {"type": kind, "sequence": text, "chains": [chr(ord("A") + i)]} for i, (kind, text) in enumerate(entities)
    ]
    return Conversion(key, f"{key}.cif", release_date=date, entities=described)


@pytest.fixture(autouse=True)
def without_mmseqs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_greedy_clusters():
    """Half the residues alike is one cluster, a quarter two; half of the length is another protein's domain."""
    first, other = protein(1), protein(2)
    half, quarter, part = mutated(first, 0.5), mutated(first, 0.75), first[:60]
    found = greedy_clusters([part, quarter, other, half, first])
    assert found[half] == found[first] in (half, first)
    assert found[quarter] == quarter and found[other] == other and found[part] == part
    assert greedy_clusters([first, half, other, quarter, part]) == found


def test_clusters_by_kind():
    long, short = protein(3), "ACDEFGHIK"
    results = [
        entry("1aaa", ("protein", long), ("protein", short), ("rna", "ACGU"), ("nonpolymer", "HEM")),
        entry(
            "2bbb", ("protein", mutated(long, 0.3)), ("protein", "ACDEFGHIR"), ("dna", "ACGU"), ("nonpolymer", "HEM")
        ),
        entry("3ccc", ("protein", short), ("rna", "ACGUA"), ("rna", "ACGU"), ("nonpolymer", "NAG-NAG")),
    ]
    found = entity_clusters(results, None)
    assert found["1aaa", 0] == found["2bbb", 0] and found["1aaa", 0] in ("protein:1aaa_A", "protein:2bbb_A")
    assert found["1aaa", 1] == found["3ccc", 0] == "protein:1aaa_B" and found["2bbb", 1] == "protein:2bbb_B"
    assert found["1aaa", 2] == found["3ccc", 2] == "rna:1aaa_C" and found["3ccc", 1] == "rna:3ccc_B"
    assert found["2bbb", 2] == "dna:2bbb_C"
    assert found["1aaa", 3] == found["2bbb", 3] == "ligand:HEM" and found["3ccc", 3] == "ligand:NAG-NAG"


def test_clusters_from_a_file(tmp_path):
    results = [entry("1aaa", ("protein", "ACDE"), ("protein", "FGHI")), entry("2bbb", ("protein", "KLMN"))]
    digest = hashlib.sha256(b"KLMN").hexdigest()
    (tmp_path / "clusters.tsv").write_text(f"1AAA_A\tc7\n{digest}\tc7\n")
    found = entity_clusters(results, tmp_path / "clusters.tsv")
    assert found == {("1aaa", 0): "c7", ("1aaa", 1): "protein:1aaa_B", ("2bbb", 0): "c7"}
    manifest = {"records": [{"id": "1AAA", "chains": [{"chain_name": "B", "cluster_id": 5}]}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert entity_clusters(results, tmp_path / "manifest.json")["1aaa", 1] == "5"
    (tmp_path / "bad.tsv").write_text("1aaa_A c7\n")
    with pytest.raises(ConfigError, match=r"bad\.tsv"):
        entity_clusters(results, tmp_path / "bad.tsv")
    with pytest.raises(ConfigError, match=r"none\.tsv"):
        entity_clusters(results, tmp_path / "none.tsv")


FAKE_MMSEQS = """#!/bin/sh
[ "$1 $5 $6 $7 $8" = "easy-cluster --min-seq-id 0.4 -c 0.8" ] || { echo "odd: $*" >&2; exit 1; }
[ -n "$BROKEN" ] && { echo "no memory" >&2; exit 1; }
printf '0\\t0\\n0\\t1\\n2\\t2\\n' > "$3_cluster.tsv"
"""


def test_mmseqs(tmp_path, monkeypatch):
    """Where mmseqs is installed its answer counts; here a stand-in says that the first two belong together."""
    program = tmp_path / "mmseqs"
    program.write_text(FAKE_MMSEQS)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin:/usr/bin")
    texts = [protein(seed) for seed in range(3)]
    assert module.cluster_proteins(texts) == {texts[0]: texts[0], texts[1]: texts[0], texts[2]: texts[2]}
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(DataError, match=r"mmseqs .*no memory"):
        module.cluster_proteins(texts)


RESULTS = [
    entry("1aaa", ("protein", "a"), ("nonpolymer", "ATP"), date="2019-01-01"),
    entry("2bbb", ("protein", "a"), ("protein", "b"), date="2019-01-01"),
    entry("3ccc", ("protein", "b"), date="2021-01-01"),
    entry("4ddd", ("protein", "d"), ("nonpolymer", "ATP"), date="2021-01-01"),
    entry("5eee", ("protein", "e"), date=None),
]
CLUSTERS = {(r.key, n): e["sequence"] for r in RESULTS for n, e in enumerate(r.entities)}


def test_split_by_name():
    """Names count whatever they resemble; what they resemble is told."""
    chosen, excluded = split(RESULTS, CLUSTERS, {"3ccc", "4ddd"}, None, None)
    assert [key for key, side in chosen.items() if side == "val"] == ["3ccc", "4ddd"] and not excluded
    assert shared_clusters(RESULTS, CLUSTERS, chosen) == ["3ccc"]


def test_split_by_date():
    """A late entry that resembles an early one belongs to neither; a shared ligand is no resemblance."""
    chosen, excluded = split(RESULTS, CLUSTERS, set(), "2020-01-01", None)
    assert chosen == {"1aaa": "train", "2bbb": "train", "4ddd": "val", "5eee": "train"}
    assert excluded == {"3ccc": "released after 2020-01-01, and similar to an entry of the training set"}
    assert shared_clusters(RESULTS, CLUSTERS, chosen) == []


def test_split_by_fraction():
    """1aaa, 2bbb and 3ccc are one group, because 2bbb has the clusters of both; groups stay together."""
    sizes = set()
    for fraction in (0.2, 0.4, 0.6, 0.8):
        chosen, _ = split(RESULTS, CLUSTERS, set(), None, fraction)
        assert chosen["1aaa"] == chosen["2bbb"] == chosen["3ccc"]
        assert shared_clusters(RESULTS, CLUSTERS, chosen) == []
        held = sum(side == "val" for side in chosen.values())
        assert 0 < held <= fraction * 5
        sizes.add(held)
        assert split(RESULTS[::-1], CLUSTERS, set(), None, fraction)[0] == chosen
    assert max(sizes) >= 3
