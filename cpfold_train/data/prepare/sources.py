"""Which entries there are to prepare: structure files, Boltz's processed entries, and PDB ids to download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpfold_train.data.prepare.download import download
from cpfold_train.data.structures.parse import SUFFIXES, entry_id
from cpfold_train.errors import ConfigError

_PDB_ID = re.compile(r"([0-9][a-z0-9]{3}|pdb_[a-z0-9]{8})", re.IGNORECASE)


@dataclass(frozen=True)
class SourceFile:
    """An entry: the sample's key, and a structure file or a ``structures/ID.npz`` of Boltz."""

    key: str
    path: Path


def names(text: str) -> set[str]:
    """Ids of a comma-separated list, in lower case."""
    return {name.strip().lower() for name in text.split(",") if name.strip()}


def find_sources(
    inputs: list[str], only: set[str], skip: set[str], folder: Path | None, url: str
) -> tuple[list[SourceFile], dict[str, str]]:
    """Entries of the inputs in the order of their keys.

    Args:
        inputs: paths of folders, structure files or lists (``.txt``, one path or PDB id a line), or PDB ids.
        only: take these keys and no others; empty for all.
        skip: leave these keys out.
        folder: where downloaded files are kept; None if nothing may be downloaded.
        url: where they come from.

    Returns:
        The entries, and why ids could not be downloaded.

    Raises:
        ConfigError: an input or a key of ``only`` does not exist, or two files have the same key.
    """
    found: dict[str, SourceFile] = {}
    wanted: set[str] = set()
    for given in inputs:
        for item in _expand(given):
            if isinstance(item, str):
                wanted.add(item)
                continue
            other = found.setdefault(item.key, item)
            if other.path != item.path:
                raise ConfigError(
                    f"{other.path} and {item.path} would both become sample {item.key}: leave one of them out"
                )
    if wanted and folder is None:
        raise ConfigError(
            f"{', '.join(sorted(wanted)[:5])} are PDB ids: type --download DIR to fetch them into a folder DIR"
        )
    chosen = {key for key in wanted if (not only or key in only) and key not in skip}
    paths, failed = download(sorted(chosen), folder, url) if chosen else ({}, {})
    found |= {key: SourceFile(key, path) for key, path in paths.items()}
    missing = sorted(only - found.keys() - failed.keys())
    if missing:
        raise ConfigError(f"no structure file for {', '.join(missing)} in {', '.join(inputs)}: check the ids")
    keys = sorted(key for key in found if (not only or key in only) and key not in skip)
    if not keys and not failed:
        raise ConfigError(f"no {', '.join(SUFFIXES)} file in {', '.join(inputs)}: type another folder")
    return [found[key] for key in keys], failed


def _expand(given: str) -> Iterator[SourceFile | str]:
    """Sources, and ids to download, that one input stands for."""
    path = Path(given)
    ids = [part.strip() for part in given.split(",")]
    if path.is_dir() and (path / "manifest.json").exists():
        for structure in sorted((path / "structures").glob("*.npz")):
            yield SourceFile(structure.stem.lower(), structure)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_structure(file):
                yield SourceFile(entry_id(file), file)
    elif path.exists() and path.suffix == ".txt":
        for line in path.read_text().splitlines():
            line = line.strip()
            if line and not line.startswith("#"):
                # Paths are as seen from the list, so that a folder with its list can be moved.
                beside = path.parent / line
                yield from _expand(str(beside) if beside.exists() else line)
    elif path.exists():
        if not _is_structure(path):
            raise ConfigError(f"{path} is neither a structure file ({', '.join(SUFFIXES)}, .gz) nor a list (.txt)")
        yield SourceFile(entry_id(path), path)
    elif all(_PDB_ID.fullmatch(name) for name in ids):
        yield from (name.lower() for name in ids)
    else:
        raise ConfigError(f"{given} does not exist: type the path of a folder or file with structures")


def _is_structure(path: Path) -> bool:
    return path.name.removesuffix(".gz").lower().endswith(SUFFIXES)
