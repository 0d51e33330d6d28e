"""The index of a shard against the samples in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpfold_train.__main__ import main
from cpfold_train.data.stream.shards import index_path, open_shards, read_sample, scan, write_shard
from cpfold_train.data.structures.structure import unpack_arrays
from cpfold_train.errors import DataError

SHARDS = ["data/shards/train-000000.tar", "data/large/train-000000.tar", "tests/data/train-000000.tar"]


@pytest.mark.parametrize("path", SHARDS)
def test_the_index_says_what_the_samples_say(path):
    for entry in open_shards([path]):
        structure, alignments, _ = read_sample(entry)
        meta = structure.meta
        assert (entry.key, entry.tokens) == (meta["id"], len(structure))
        assert (entry.release_date, entry.resolution) == (meta["release_date"], meta["resolution"])
        assert entry.interfaces == meta["interfaces"]
        assert entry.msa_rows == max(map(len, alignments.values()), default=0)
        assert entry.chains == [
            {name: chain[name] for name in ("type", "entity", "length", "observed", "cluster")}
            for chain in meta["chains"]
        ]
    assert any(entry.interfaces for entry in open_shards([path]))


@pytest.mark.parametrize("path", SHARDS)
def test_the_index_fits_the_tar(path, tmp_path):
    """It is what a scan finds; and if it belongs to another tar, the tar is scanned instead."""
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(Path(path).read_bytes())
    scanned = scan(tar)
    stored = unpack_arrays(index_path(Path(path)).read_bytes())
    for name, values in scanned.items():
        np.testing.assert_array_equal(values, stored[name], err_msg=name)
    expected = open_shards([str(tar)])
    stored["bytes"] = stored["bytes"] + 1
    stored["tokens"] = stored["tokens"] + 1
    np.savez_compressed(index_path(tar), **stored)
    assert open_shards([str(tar)]) == expected
    for damaged in (b"", index_path(Path(path)).read_bytes()[:200]):
        index_path(tar).write_bytes(damaged)
        assert open_shards([str(tar)]) == expected


def test_paths_with_brackets(tmp_path):
    tar = tmp_path / "out [1]" / "train-000000.tar"
    tar.parent.mkdir()
    tar.write_bytes(Path(SHARDS[2]).read_bytes())
    assert len(open_shards([str(tar)])) == len(open_shards([SHARDS[2]]))
    assert main(["inspect", str(tar.parent)]) == 0


def test_samples_of_another_format(tmp_path):
    members = {"json": json.dumps({"format_version": 1}).encode()}
    with pytest.raises(DataError, match=r"old\.tar .*\b1 .*\b2\b"):
        write_shard(tmp_path / "old.tar", [("a", members)])
    with pytest.raises(DataError, match=r"empty\.tar"):
        write_shard(tmp_path / "empty.tar", [])
    (tmp_path / "no.tar").write_bytes(b"nothing" * 100)
    with pytest.raises(DataError, match=r"no\.tar"):
        open_shards([str(tmp_path / "no.tar")])
