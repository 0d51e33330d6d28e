"""A thousand damaged samples: each is refused with a reason or read as valid, and nothing hangs, crashes or swells."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cpfold_train.data.alignments.alignment import Alignment, pack_alignments, unpack_alignments
from cpfold_train.data.stream.batch import collate, make_crop
from cpfold_train.data.stream.shards import open_shards, read_sample, write_shard
from cpfold_train.data.structures.structure import ARRAYS, pack_arrays, pack_structure, unpack_arrays, unpack_structure
from cpfold_train.errors import DataError
from cpfold_train.parallel.grid import Grid

SHARD = "data/shards/val-000000.tar"


@pytest.fixture(scope="module")
def entries():
    return open_shards([SHARD])


@pytest.fixture
def outcome():
    """Read a sample, and use it if it is valid; the reason why not otherwise."""

    def attempt(entry):
        try:
            sample = read_sample(entry)
        except DataError as error:
            assert str(error).startswith(f"{entry.tar}: sample {entry.key} cannot be used: ")
            return str(error).removeprefix(f"{entry.tar}: sample {entry.key} cannot be used: ")
        collate([make_crop(*sample, crop_size=32, max_msa_rows=8, draw=(0, 0, 0))], Grid())
        return "valid"

    return attempt


def damaged_bytes(data, entries, rng):
    """The tar with one kind of damage, and how it is called."""
    entry, other = (entries[i] for i in rng.permutation(len(entries))[:2])
    names = sorted(set(entry.members) & set(other.members))
    offset, size = entry.members[names[rng.integers(len(names))]]
    data = bytearray(data)
    kind = ("flip", "truncate", "swap", "zero", "repeat")[rng.integers(5)]
    if kind == "flip":
        for offset_of_byte in rng.integers(offset - 512, offset + size, rng.integers(1, 9)):
            data[offset_of_byte] ^= 1 << rng.integers(8)
    elif kind == "truncate":
        del data[offset + rng.integers(size) :]
    elif kind == "swap":
        there, length = other.members[names[rng.integers(len(names))]]
        part = min(size, length)
        data[offset : offset + part] = data[there : there + part]
    elif kind == "zero":
        start = offset + rng.integers(size)
        data[start : offset + size] = bytes(offset + size - start)
    else:
        start = offset + rng.integers(size // 2)
        data[start : start + 64] = data[start + 64 : start + 128]
    return bytes(data), entry, kind


def test_damaged_bytes(entries, outcome, tmp_path):
    data, tar, rng = Path(SHARD).read_bytes(), tmp_path / "damaged.tar", np.random.default_rng(0)
    outcomes, before = Counter(), psutil.Process().memory_info().rss
    for _ in range(600):
        damaged, entry, kind = damaged_bytes(data, entries, rng)
        tar.write_bytes(damaged)
        outcomes[kind, outcome(replace(entry, tar=str(tar))) == "valid"] += 1
    assert sum(outcomes.values()) == 600
    assert all(outcomes[kind, False] > 50 for kind in ("flip", "truncate", "swap", "zero", "repeat"))
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def damaged_arrays(members, rng):
    """The sample with one array damaged behind every checksum, or its JSON."""
    kind = ("value", "bits", "shape", "type", "missing", "json", "alignment")[rng.integers(7)]
    structure = unpack_structure(members)
    arrays = {name: np.array(getattr(structure, name)) for name in ARRAYS}
    name = ARRAYS[rng.integers(len(ARRAYS))]
    if kind == "alignment" and "msa.npz" in members:
        alignment = unpack_alignments(unpack_arrays(members["msa.npz"]))[0]
        cut = Alignment(alignment.tokens[:, : rng.integers(88)], alignment.deletions, alignment.keys)
        spoilt = replace(alignment, tokens=alignment.tokens + np.int8(rng.integers(1, 90)))
        damaged = pack_alignments({0: (cut, spoilt)[rng.integers(2)]})
        return members | {"msa.npz": pack_arrays(damaged)}
    if kind == "json":
        meta = json.loads(members["json"])
        key = sorted(meta)[rng.integers(len(meta))]
        meta[key] = (None, -1, "x", [], {}, [[9999, -9999]], float("nan"))[rng.integers(7)]
        return members | {"json": json.dumps(meta).encode()}
    values = arrays[name]
    if kind == "missing":
        del arrays[name]
    elif kind == "shape":
        shapes = (values[: rng.integers(len(values) + 1)], values[..., None], np.zeros((), values.dtype))
        arrays[name] = shapes[rng.integers(3)]
    elif kind == "type":
        arrays[name] = values.astype(("S3", "f8", "i8", "?")[rng.integers(4)] if values.dtype.kind != "S" else "S9")
    elif values.size:
        raw = values.reshape(-1).view(np.uint8)
        count = 1 if kind == "bits" else len(raw) // 4
        raw[rng.integers(0, len(raw), count)] = rng.integers(0, 256, count)
    return members | {"structure.npz": pack_arrays(arrays)}


def test_damaged_arrays(entries, outcome, tmp_path):
    """What no checksum notices, as a faulty writer would leave it."""
    rng, path = np.random.default_rng(1), tmp_path / "train-000000.tar"
    stored = {}
    for entry in entries:
        with open(entry.tar, "rb") as file:
            stored[entry.key] = {}
            for name, (offset, size) in entry.members.items():
                file.seek(offset)
                stored[entry.key][name] = file.read(size)
    reasons = Counter()
    for turn in range(400):
        entry = entries[turn % len(entries)]
        members = damaged_arrays(stored[entry.key], rng)
        offset, written = 0, {}
        with path.open("wb") as file:
            for name, data in members.items():
                header = make_header(f"{entry.key}.{name}", len(data))
                file.write(header + data)
                written[name] = (offset + len(header), len(data))
                offset += len(header) + len(data)
        reasons[outcome(replace(entry, tar=str(path), members=written))] += 1
    assert sum(reasons.values()) == 400
    assert reasons["valid"] < 250
    assert len(reasons) > 40


def make_header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_a_header_cannot_ask_for_memory(entries, outcome, tmp_path):
    """An npz whose array claims 10^15 elements, and one that holds Python objects."""
    structure, *_ = read_sample(entries[0])
    for claim in (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},), }}", "{'descr': '|O', 'x': 1}"):
        header = claim.ljust(117).encode() + b"\n"
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(40)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in ARRAYS:
                archive.writestr(f"{name}.npy", npy)
        path = tmp_path / "train-000000.tar"
        write_shard(path, [(entries[0].key, pack_structure(structure) | {"structure.npz": buffer.getvalue()})])
        before = psutil.Process().memory_info().rss
        assert "ValueError" in outcome(open_shards([str(path)])[0])
        assert psutil.Process().memory_info().rss - before < 50 * 2**20
