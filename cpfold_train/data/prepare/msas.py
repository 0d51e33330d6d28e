"""Find the alignment files of an entry and map them to its entities."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

from cpfold_train.data.alignments.a3m import SUFFIXES, chains_of, merge, read_alignment
from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.prepare.boltz_format import read_boltz_alignment, read_record
from cpfold_train.data.structures.parse import chain_letters
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import ConfigError, DataError, in_one_line
from cpfold_train.vocabulary import MOL_TYPES

AlignmentFile = tuple[Path, str]
"""An alignment and the chains that it is for: a chain's name, or the letters of several."""


def find_alignments(
    folder: Path | None, table: Path | None, entries: Collection[str]
) -> dict[str, list[AlignmentFile]]:
    """Alignment files by entry, from names ``ENTRY_CHAINS_LABEL`` in a folder and from a table.

    Args:
        table: tab-separated lines of entry, chain and path, the path as seen from the table.
        entries: ids that are known; other files get the entry that their names begin with up to the first ``_``.

    Raises:
        ConfigError: the folder, the table or a file that it names does not exist.
    """
    by_entry: dict[str, list[AlignmentFile]] = {}
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(
                f"--msa {folder} is not a folder: type the path of a folder with .a3m, .csv or .npz files"
            )
        for path in sorted(folder.rglob("*")):
            if path.name.removesuffix(".gz").endswith(SUFFIXES):
                entry, chains, _ = chains_of(path, entries)
                by_entry.setdefault(entry, []).append((path, chains))
    for entry, chains, path in table_rows(table, "--msa-map", ("entry", "chain", "path")):
        by_entry.setdefault(entry, []).append((path, chains))
    return by_entry


def table_rows(table: Path | None, option: str, columns: tuple[str, ...]) -> list[tuple]:
    """Lines of a tab-separated table, none without one: the entry in lower case, and the path as seen from the table.

    Raises:
        ConfigError: the table or a file that it names does not exist, or a line has not these columns.
    """
    if table is None:
        return []
    if not table.is_file():
        raise ConfigError(f"{option} {table} does not exist: type the path of a tab-separated file")
    found = []
    with table.open(newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t"), 1):
            if not row or row[0].startswith("#") or row == list(columns):
                continue
            if len(row) != len(columns):
                listed = f"{', '.join(columns[:-1])} and {columns[-1]}"
                raise ConfigError(f"{table} line {number} has {len(row)} columns: write {listed}")
            given = dict(zip(columns, row))
            path = table.parent / given["path"]
            if not path.is_file():
                raise ConfigError(f"{table} line {number}: {path} does not exist")
            found.append(tuple((given | {"entry": given["entry"].lower(), "path": path}).values()))
    return found


def align_entities(
    structure: Structure, files: list[AlignmentFile], depth: int, problems: list[str]
) -> dict[int, Alignment]:
    """Alignments by entity, at most ``depth`` rows each. A file counts for the entities of all chains it is for.

    What is wrong with a file is added to ``problems``, and the file left out.
    """
    found: dict[int, list[Alignment]] = {}
    for path, chains in files:
        entities = _entities_of(chains, structure)
        if not entities:
            problems.append(f"{path.name}: the entry has no such chain")
        for entity, asym_id in entities.items():
            mol_type = MOL_TYPES.index(structure.meta["chains"][asym_id]["type"])
            try:
                found.setdefault(entity, []).append(read_alignment(path, mol_type, chain_letters(structure, asym_id)))
            except DataError as error:
                problems.append(str(error))
            except Exception as error:  # a damaged file can fail anywhere in gzip, csv or numpy
                problems.append(f"{path.name} cannot be read: {in_one_line(error)}")
    return {entity: merge(alignments, depth) for entity, alignments in sorted(found.items()) if alignments}


def boltz_entities(
    structure: Structure, path: Path, folder: Path | None, depth: int, problems: list[str]
) -> dict[int, Alignment]:
    """The same for an entry in Boltz's format, whose record names the alignments of its chains.

    Args:
        path: of ``structures/ID.npz``; alignments are in ``msa`` beside ``structures``.
        folder: looked in first.
    """
    ids = {chain["chain_name"]: chain["msa_id"] for chain in read_record(path)["chains"]}
    folders = [candidate for candidate in (folder, path.parent.parent / "msa") if candidate is not None]
    found = {}
    for entity, asym_id in _polymers(structure).items():
        msa_id = ids.get(structure.meta["chains"][asym_id]["name"], -1)
        if str(msa_id) in ("-1", ""):
            continue
        file = next(
            (candidate / f"{msa_id}.npz" for candidate in folders if (candidate / f"{msa_id}.npz").exists()), None
        )
        if file is None:
            problems.append(f"{msa_id}.npz, which the record names, is not there")
            continue
        try:
            alignment = read_boltz_alignment(file, structure.meta["chains"][asym_id]["length"])
        except DataError as error:
            problems.append(str(error))
        else:
            found[entity] = merge([alignment], depth)
    return found


def _polymers(structure: Structure) -> dict[int, int]:
    """First chain of each entity that is a polymer."""
    first: dict[int, int] = {}
    for asym_id, chain in enumerate(structure.meta["chains"]):
        if chain["type"] != "nonpolymer":
            first.setdefault(chain["entity"], asym_id)
    return first


def _entities_of(names: str, structure: Structure) -> dict[int, int]:
    """Entities, each with its first chain, that ``names`` stands for.

    ``AC`` means the chains A and C, unless a chain is itself called AC. Authors' names go before those of mmCIF.
    """
    first = _polymers(structure)
    polymers = [chain for chain in structure.meta["chains"] if chain["type"] != "nonpolymer"]
    entity = {chain["name"]: chain["entity"] for chain in polymers}
    entity |= {chain["auth_name"]: chain["entity"] for chain in polymers}
    listed = [names] if names in entity else list(names)
    return {entity[name]: first[entity[name]] for name in listed if name in entity}
