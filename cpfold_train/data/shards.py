"""Shards: WebDataset tars of samples, each with an index beside it for random access.

A sample is the members ``ID.json``, ``ID.structure.npz`` and, where alignments exist, ``ID.msa.npz``. The index of
``train-000000.tar`` is ``train-000000.index.json``; where it is missing or older than the tar, the tar is scanned.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpfold_train.data.alignment import Alignment, unpack_alignments
from cpfold_train.data.structure import FORMAT_VERSION, Structure, unpack_arrays, unpack_structure
from cpfold_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class Entry:
    """Where a sample lies.

    Attributes:
        tar: path of the shard.
        key: the sample's id.
        tokens: how many it has.
        chains: its chains as in the sample's JSON.
        members: offset and size in the tar, by extension.
    """

    tar: str
    key: str
    tokens: int
    chains: list[dict[str, Any]]
    members: dict[str, tuple[int, int]]


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples (key, members by extension) and the index. The same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    index_path(path).write_text(json.dumps(scan(path), indent=1) + "\n")


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies: beside it, ``NAME.index.json``."""
    return tar.with_suffix(".index.json")


def scan(path: Path) -> dict[str, Any]:
    """The index of a tar, read off the tar."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                sample = samples.setdefault(key, {"key": key, "members": {}})
                sample["members"][extension] = [member.offset_data, member.size]
                if extension == "json":
                    meta = json.load(tar.extractfile(member))
                    sample.update(tokens=meta["counts"]["tokens"], chains=meta["chains"])
    except (tarfile.TarError, ValueError, KeyError, OSError) as error:
        raise DataError(f"{path} is not a shard that prepare wrote: {type(error).__name__}: {error}") from error
    return {"format_version": FORMAT_VERSION, "bytes": path.stat().st_size, "samples": list(samples.values())}


def open_shards(patterns: list[str]) -> list[Entry]:
    """Entries of all samples in the tars that the globs match, in order of tar and place.

    Raises:
        ConfigError: a glob matches nothing.
    """
    entries = []
    for pattern in patterns:
        tars = sorted(path for path in glob.glob(pattern) if path.endswith(".tar"))
        if not tars:
            raise ConfigError(
                f"no shard matches {pattern}: type the path of existing .tar shards, or make them with "
                f"python -m cpfold_train prepare STRUCTURES {Path(pattern).parent}"
            )
        for tar in tars:
            for sample in _index(Path(tar))["samples"]:
                members = {extension: tuple(place) for extension, place in sample["members"].items()}
                entries.append(Entry(tar, sample["key"], sample["tokens"], sample["chains"], members))
    return entries


def _index(tar: Path) -> dict[str, Any]:
    path = index_path(tar)
    if path.exists():
        index = json.loads(path.read_text())
        if index["bytes"] == tar.stat().st_size:
            return index
    return scan(tar)


def read_sample(entry: Entry) -> tuple[Structure, dict[int, Alignment]]:
    """Read and decode one sample by random access: its structure and its alignments by entity.

    Raises:
        DataError: naming the tar, the sample and what is wrong.
    """
    try:
        members = {}
        with open(entry.tar, "rb") as file:
            for extension, (offset, size) in entry.members.items():
                file.seek(offset)
                members[extension] = file.read(size)
        structure = unpack_structure(members)
        alignments = unpack_alignments(unpack_arrays(members["msa.npz"])) if "msa.npz" in members else {}
    except Exception as error:  # damaged bytes can fail anywhere in zip, zlib, numpy or json
        raise DataError(f"{entry.tar}: sample {entry.key} cannot be read: {type(error).__name__}: {error}") from error
    return structure, alignments
