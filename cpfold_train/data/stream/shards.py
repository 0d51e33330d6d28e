"""Shards: WebDataset tars of samples, each with an index beside it for random access.

A sample is the members ``ID.json``, ``ID.structure.npz`` and, where there are any, ``ID.msa.npz`` and
``ID.templates.npz``. The index of ``train-000000.tar`` is ``train-000000.index.npz``: what choosing samples needs to
know of all of them, as columns, so that it is small and quick to load. Where it is missing or does not fit the tar, the
tar is scanned.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpfold_train.data.alignments.alignment import Alignment, unpack_alignments
from cpfold_train.data.features.templates import Template, unpack_templates
from cpfold_train.data.stream.validate import check_sample
from cpfold_train.data.structures.structure import (
    FORMAT_VERSION,
    Structure,
    check_version,
    pack_arrays,
    unpack_arrays,
    unpack_structure,
)
from cpfold_train.errors import ConfigError, DataError, in_one_line
from cpfold_train.paths import looked_for
from cpfold_train.vocabulary import MOL_TYPES
from cpfold_train.whole_file import whole_file

MAX_NAME = 100
"""Bytes of a member's name that its header in the tar has room for."""


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample lies.

    Attributes:
        tar: path of the shard.
        key: the sample's id.
        members: offset and size in the tar, by extension.
    """

    tar: str
    key: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class StoredSample(SampleLocation):
    """Where a sample lies, and what its shard's index knows of it.

    Attributes:
        tokens: how many it has.
        release_date: ISO 8601, None where the file did not say.
        resolution: in Angstrom, None where there is none.
        msa_rows: of the deepest alignment, 0 without one.
        chains: ``type``, ``entity``, ``length`` and ``observed`` residues, and ``cluster`` of each.
        interfaces: pairs of chains, as numbers in ``chains``.
    """

    tokens: int
    release_date: str | None
    resolution: float | None
    msa_rows: int
    chains: list[dict[str, Any]]
    interfaces: list[list[int]]


class Sample(NamedTuple):
    """A decoded sample: its structure, alignments by entity, and templates."""

    structure: Structure
    alignments: dict[int, Alignment]
    templates: list[Template]


MEMBERS = ("json", "structure.npz", "msa.npz", "templates.npz")
_CHAIN = {"entity": np.int16, "length": np.int32, "observed": np.int32}


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples (key, members by extension) and the index. The same samples give the same bytes."""
    with (
        whole_file(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    with whole_file(index_path(path), "wb") as file:
        file.write(pack_arrays(scan(path)))


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies: beside it, ``NAME.index.npz``."""
    return tar.with_suffix(".index.npz")


def scan(path: Path) -> dict[str, np.ndarray]:
    """The index of a tar, read off the tar: columns over its S samples, their C chains and I interfaces.

    Returns:
        ``format_version`` and ``bytes`` of the tar; ``key``, ``tokens``, ``release_date`` (empty where unknown),
        ``resolution`` (NaN where there is none) and ``msa_rows`` (S,); ``offset`` and ``size`` (S, 4) of ``MEMBERS``,
        -1 where absent; ``chain_start`` and ``interface_start`` (S + 1,) into the columns of chains and interfaces;
        ``chain_type``, ``chain_entity``, ``chain_length``, ``chain_observed`` and ``chain_cluster`` (C,), the last an
        index into ``cluster``; ``interface`` (I, 2) chains, counted within the sample.

    Raises:
        DataError: it is not a tar that ``prepare`` wrote.
    """
    metas: dict[str, dict[str, Any]] = {}
    locations: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                locations.setdefault(key, {})[extension] = (member.offset_data, member.size)
                if extension == "json":
                    metas[key] = check_version(json.load(tar.extractfile(member)))
        if not locations:
            raise DataError("it holds no sample")
        return _columns(path.stat().st_size, metas, locations)
    except DataError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (tarfile.TarError, ValueError, KeyError, OSError) as error:
        raise DataError(f"{path} is not a shard that prepare wrote: {in_one_line(error)}") from error


def _columns(
    size: int, metas: dict[str, dict], locations: dict[str, dict[str, tuple[int, int]]]
) -> dict[str, np.ndarray]:
    samples = [metas[key] for key in locations]
    chains = [chain for meta in samples for chain in meta["chains"]]
    cluster, number = np.unique([chain["cluster"] for chain in chains], return_inverse=True)
    location = np.array([[members.get(name, (-1, -1)) for name in MEMBERS] for members in locations.values()])
    pairs = [pair for meta in samples for pair in meta["interfaces"]]
    resolutions = [np.nan if meta["resolution"] is None else meta["resolution"] for meta in samples]
    return {
        "format_version": np.int32(FORMAT_VERSION),
        "bytes": np.int64(size),
        "key": np.array(list(locations)),
        "tokens": np.array([meta["counts"]["tokens"] for meta in samples], dtype=np.int32),
        "release_date": np.array([meta["release_date"] or "" for meta in samples]),
        "resolution": np.array(resolutions, dtype=np.float32),
        "msa_rows": np.array([max(meta["msa_depth"].values(), default=0) for meta in samples], dtype=np.int32),
        "offset": location[..., 0].astype(np.int64),
        "size": location[..., 1].astype(np.int64),
        "chain_start": np.cumsum([0] + [len(meta["chains"]) for meta in samples]).astype(np.int32),
        "chain_type": np.array([MOL_TYPES.index(chain["type"]) for chain in chains], dtype=np.int8),
        **{f"chain_{name}": np.array([chain[name] for chain in chains], dtype=kind) for name, kind in _CHAIN.items()},
        "chain_cluster": number.astype(np.int32),
        "cluster": cluster,
        "interface_start": np.cumsum([0] + [len(meta["interfaces"]) for meta in samples]).astype(np.int32),
        "interface": np.array(pairs, dtype=np.int16).reshape(-1, 2),
    }


def read_indices(patterns: Sequence[str]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Path and index (see :func:`scan`) of all tars that the globs match, in order.

    Raises:
        ConfigError: a glob matches nothing.
        DataError: a tar is not one that ``prepare`` wrote.
    """
    found = []
    for pattern in patterns:
        # A path may have brackets in it.
        matching = (
            [pattern] if Path(pattern).is_file() else glob.glob(pattern) or glob.glob(pattern.replace("[", "[[]"))
        )
        tars = sorted(path for path in matching if path.endswith(".tar"))
        if not tars:
            raise ConfigError(
                f"no shard matches {pattern}{looked_for(pattern)}: type the path of existing .tar shards, or make them "
                f"with python -m cpfold_train prepare STRUCTURES {Path(pattern).parent}"
            )
        found.extend((tar, _index(Path(tar))) for tar in tars)
    return found


def open_shards(patterns: Sequence[str]) -> list[StoredSample]:
    """All samples in the tars that the globs match, tar by tar; see :func:`read_indices`."""
    return [entry for tar, index in read_indices(patterns) for entry in _entries(tar, index)]


def location_of(tar: str, index: dict[str, np.ndarray], row: int) -> SampleLocation:
    """Where the sample in a row of the index lies."""
    locations = zip(MEMBERS, index["offset"][row].tolist(), index["size"][row].tolist())
    return SampleLocation(
        tar, str(index["key"][row]), {name: (offset, size) for name, offset, size in locations if offset >= 0}
    )


def _entries(tar: str, index: dict[str, np.ndarray]) -> list[StoredSample]:
    columns = {name: values.tolist() for name, values in index.items()}
    found = []
    for row, tokens in enumerate(columns["tokens"]):
        chains = range(*columns["chain_start"][row : row + 2])
        resolution = columns["resolution"][row]
        found.append(
            StoredSample(
                **vars(location_of(tar, index, row)),
                tokens=tokens,
                release_date=columns["release_date"][row] or None,
                resolution=None if np.isnan(resolution) else round(resolution, 3),
                msa_rows=columns["msa_rows"][row],
                chains=[
                    {
                        "type": MOL_TYPES[columns["chain_type"][chain]],
                        **{name: columns[f"chain_{name}"][chain] for name in _CHAIN},
                        "cluster": columns["cluster"][columns["chain_cluster"][chain]],
                    }
                    for chain in chains
                ],
                interfaces=columns["interface"][slice(*columns["interface_start"][row : row + 2])],
            )
        )
    return found


def _index(tar: Path) -> dict[str, np.ndarray]:
    path = index_path(tar)
    # It can always be made again, whatever has become of it.
    with suppress(Exception):
        index = unpack_arrays(path.read_bytes())
        if index["bytes"] == tar.stat().st_size and index["format_version"] == FORMAT_VERSION:
            return index
    return scan(tar)


def read_sample(location: SampleLocation) -> Sample:
    """Read one sample by random access, decode and check it.

    Raises:
        DataError: naming the tar, the sample and what is wrong with it.
        OSError: the file system failed, which says nothing about the sample.
    """
    stored = {}
    with open(location.tar, "rb") as file:
        for extension, (offset, size) in location.members.items():
            file.seek(offset - tarfile.BLOCKSIZE)
            stored[extension] = file.read(tarfile.BLOCKSIZE + size)
    try:
        members = {extension: _member(location, extension, data) for extension, data in stored.items()}
        structure = unpack_structure(members)
        alignments = unpack_alignments(unpack_arrays(members["msa.npz"])) if "msa.npz" in members else {}
        templates = unpack_templates(unpack_arrays(members["templates.npz"])) if "templates.npz" in members else []
        check_sample(structure, alignments, templates, location.key)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in zip, zlib, numpy or json
        reason = str(error) if isinstance(error, DataError) else in_one_line(error)
        raise DataError(f"{location.tar}: sample {location.key} cannot be used: {reason}") from error
    return Sample(structure, alignments, templates)


def _member(location: SampleLocation, extension: str, stored: bytes) -> bytes:
    """Content of a member, whose header must be the one that the index promises."""
    name, size = f"{location.key}.{extension}", location.members[extension][1]
    header = tarfile.TarInfo.frombuf(stored[: tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
    if (header.name, header.size) != (name, size):
        raise DataError(f"the tar has {header.name} ({header.size} bytes) where its index has {name} ({size} bytes)")
    if len(stored) < tarfile.BLOCKSIZE + size:
        raise DataError(f"the tar ends within {name}")
    return stored[tarfile.BLOCKSIZE :]
