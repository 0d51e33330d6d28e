"""Samples that cannot be used: replaced alike on all ranks, noted once, and too many of them end the run."""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.quarantine import note, read_quarantine
from cpfold_train.data.stream.sampling import Source
from cpfold_train.data.stream.shards import SampleLocation, open_shards
from cpfold_train.errors import DataError
from cpfold_train.parallel.grid import Grid

BAD = {"1kd8", "4zey"}


@pytest.fixture
def shards(tmp_path):
    """Nine training samples, of which two are damaged."""
    for path in Path("data/shards").glob("train-000000.*"):
        shutil.copy(path, tmp_path)
    tar = tmp_path / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    for entry in open_shards([str(tar)]):
        if entry.key in BAD:
            offset, size = entry.members["structure.npz"]
            data[offset + 100 : offset + size] = bytes(size - 100)
    tar.write_bytes(data)
    return [str(tmp_path / "*.tar")]


def loader(shards, grid=None, **settings):
    settings = {"crop_size": 32, "max_msa_rows": 8, "max_bad_share": 0.5, "seed": 1} | settings
    return TileLoader([Source(shards)], grid or Grid(), **settings)


def seen(batches):
    return [(batch["id"], batch["sample_key"].tolist(), batch["filler"].tolist()) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_noted_once(shards, tmp_path, workers):
    path = tmp_path / "run" / "quarantine.jsonl"
    whole = loader(shards, num_workers=workers, quarantine=path)
    epochs = [seen(whole) for _ in range(3)]
    for epoch in epochs:
        keys = [key for ids, _, _ in epoch for key in ids]
        assert len(keys) == 9
        assert not BAD & set(keys)
        assert len(set(keys)) == 7, "each good one came"
        assert sum(filler[0] for _, _, filler in epoch) == 2, "the two that stand in do not count"
    assert whole.quarantined >= 6
    lines = read_quarantine(path)
    assert sorted(line["key"] for line in lines) == sorted(BAD)
    for line in lines:
        assert line.keys() == {"tar", "key", "reason", "epoch", "position", "rank"}
        assert line["key"] in line["reason"]
        assert (line["epoch"], line["rank"]) == (0, 0)


def test_all_ranks_replace_alike_and_one_writes(shards, tmp_path):
    expected = seen(loader(shards))
    for rank in range(6):
        path = tmp_path / f"quarantine-{rank}.jsonl"
        assert seen(loader(shards, Grid(2, 3, 1, rank), quarantine=path)) == expected
        assert path.exists() == (rank == 0)
    replicas = [seen(loader(shards, Grid(1, 2, 2, rank), samples_per_epoch=8)) for rank in range(4)]
    assert replicas[0] == replicas[1] != replicas[2] == replicas[3]


def test_validation_takes_the_next_sample(shards):
    order = [entry.key for entry in open_shards(shards)]
    keys = [ids[0] for ids, _, _ in seen(loader(shards, shuffle=False))]
    expected = [next(k for k in (order * 2)[i:] if k not in BAD) for i in range(9)]
    assert keys == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many(shards, workers):
    """At most one of nine: the second ends the run, and the sentence says why and what to type."""
    with pytest.raises(DataError, match=r"\b2 of the 9 .*data\.max_bad_share .*0\.2"):
        list(loader(shards, max_bad_share=0.2, num_workers=workers))
    assert len(list(loader(shards, max_bad_share=0.4, num_workers=workers))) == 9


def test_nothing_but_bad_samples(shards, tmp_path):
    tar = next(tmp_path.glob("*.tar"))
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(DataError, match="5 of the 9 "):
        list(loader(shards))


def test_a_data_set_of_which_nothing_can_be_read(shards, tmp_path, monkeypatch):
    """However many samples may be bad, it is told after a few."""
    tar = next(tmp_path.glob("*.tar"))
    tar.write_bytes(bytes(tar.stat().st_size))
    monkeypatch.setattr("cpfold_train.data.stream.loader.MOST_ATTEMPTS", 3)
    with pytest.raises(DataError, match="3 of the 900 "):
        list(loader(shards, samples_per_epoch=900))


def test_a_torn_line_stops_nothing(shards, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"tar": "a.tar", "ke')
    assert len(list(loader(shards, quarantine=path))) == 9
    assert sum(key in path.read_text() for key in BAD) == 2


def test_a_lost_file_is_not_the_samples_fault(shards, tmp_path):
    whole = loader(shards, quarantine=tmp_path / "quarantine.jsonl")
    next(tmp_path.glob("*.tar")).unlink()
    with pytest.raises(FileNotFoundError):
        list(whole)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_counts_start_again_with_each_epoch(shards):
    whole = loader(shards, max_bad_share=0.4)
    assert sum(len(list(whole)) for _ in range(4)) == 36
    assert whole.quarantined > 4


def test_many_writers(tmp_path):
    """Lines written at the same time do not mix."""
    path = tmp_path / "quarantine.jsonl"
    with ThreadPoolExecutor(8) as pool:
        for i in range(200):
            pool.submit(note, path, SampleLocation("a.tar", f"s{i}", {}), "x" * 500, 0, i, 0)
    assert sorted(line["position"] for line in read_quarantine(path)) == list(range(200))


def test_a_worker_that_dies_ends_the_iteration(shards):
    whole = loader(shards, num_workers=1, prefetch_factor=2, start_method="fork")
    others = set(psutil.Process().children())
    batches = iter(whole)
    next(batches)
    for process in set(psutil.Process().children()) - others:
        process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        for _ in itertools.repeat(None, 30):
            next(batches)
    assert time.monotonic() - start < 10
