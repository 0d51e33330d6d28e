"""What a user asks to predict: shards, structure files and sequences, found without being read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cpfold_train.data.inputs.complex import Complex
from cpfold_train.data.inputs.sequences import MAX_ROWS, read_sequences
from cpfold_train.data.inputs.sequences import SUFFIXES as SEQUENCES
from cpfold_train.data.prepare.msas import AlignmentFile, align_entities, find_alignments
from cpfold_train.data.stream.shards import SampleLocation, open_shards, read_sample
from cpfold_train.data.structures.parse import SUFFIXES as STRUCTURES
from cpfold_train.data.structures.parse import entry_id, read_structure
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class Query:
    """A complex to predict.

    Attributes:
        id: in lower case; the name of its results.
        source: the file that it is in.
        read: reads it; raises DataError with a sentence on what is wrong with it.
    """

    id: str
    source: str
    read: Callable[[], Complex]


def find_queries(inputs: Sequence[str], msa: Path | None = None, ids: Sequence[str] = ()) -> list[Query]:
    """All that the inputs hold, in order.

    Args:
        inputs: ``.tar`` shards (or a glob), structure files, FASTA or YAML files, or folders of these.
        msa: folder of alignments ``ENTRY_CHAINS_LABEL.a3m`` for entities that come with none.
        ids: only these, if any are given.

    Raises:
        ConfigError: there is nothing, or two of them have one name.
    """
    # Filled when all names are known, and looked into when a query is read.
    listed: dict[str, list[AlignmentFile]] = {}
    queries = [query for given in inputs for query in _found(given, listed)]
    listed.update(find_alignments(msa, None, {query.id for query in queries}))
    by_id: dict[str, Query] = {}
    for query in queries:
        other = by_id.setdefault(query.id, query)
        if other is not query:
            raise ConfigError(f"{other.source} and {query.source} are both called {query.id}: rename one of them")
    wanted = [name.lower() for name in ids]
    if missing := [name for name in wanted if name not in by_id]:
        raise ConfigError(f"there is no {missing[0]} among the {len(by_id)} inputs: type one of them after --id")
    return [by_id[name] for name in wanted] if wanted else queries


def _found(given: str, listed: dict[str, list[AlignmentFile]]) -> Iterator[Query]:
    path = Path(given)
    if given.endswith(".tar"):
        for location in open_shards([given]):
            yield Query(location.key, location.tar, partial(_of_shard, location))
    elif path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix == ".tar" or _reader(file)]
        if not files:
            raise ConfigError(f"the folder {given} holds no shard, structure file, FASTA or YAML")
        for file in files:
            yield from _found(str(file), listed)
    else:
        read = _reader(path)
        if read is None:
            kinds = ", ".join((".tar", *STRUCTURES, *SEQUENCES))
            raise ConfigError(f"{given} is not a folder and none of {kinds}: type the path of one of these")
        if not path.is_file():
            raise ConfigError(f"{given} does not exist: type the path of an input")
        name = entry_id(path)
        yield Query(name, given, partial(_of_file, path, read, listed))


def _reader(path: Path) -> Callable[[Path], Complex] | None:
    """What reads files of this kind."""
    if path.suffix in SEQUENCES:
        return read_sequences
    return _of_structure if path.name.removesuffix(".gz").endswith(STRUCTURES) else None


def _of_structure(path: Path) -> Complex:
    structure, _ = read_structure(path)
    structure.meta["interfaces"] = []
    return Complex(structure, {})


def _of_shard(location: SampleLocation) -> Complex:
    return Complex(*read_sample(location))


def _of_file(path: Path, read: Callable[[Path], Complex], listed: dict[str, list[AlignmentFile]]) -> Complex:
    given = read(path)
    problems: list[str] = []
    alignments = align_entities(given.structure, listed.get(entry_id(path), []), MAX_ROWS, problems)
    if problems:
        raise DataError(problems[0])
    return Complex(given.structure, alignments | given.alignments, given.templates, given.conditions)


def has_truth(structure: Structure) -> bool:
    """Whether any of its polymers' center atoms is resolved."""
    return bool((structure.center[1] & structure.polymer).any())
