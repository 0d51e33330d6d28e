"""Read alignments and map them to an entity's full sequence.

In an a3m file upper-case letters and ``-`` are the query's columns; lower-case letters are residues inserted between
two columns. An insertion is recorded at the column that follows it, as the number of residues there ("deletion", seen
from the query, which lacks them); insertions after the last column are not counted. Boltz's csv files hold the same
sequences in a column ``sequence``, and beside each a ``key``; rows of different chains with the same key belong
together.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.structures.pairwise import align
from cpfold_train.data.structures.residues import letter_table
from cpfold_train.errors import DataError
from cpfold_train.parallel.random import key_of
from cpfold_train.vocabulary import DNA, GAP, RNA

SUFFIXES = (".a3m", ".csv")
MIN_IDENTITY = 0.9
_SAME_BASE = {RNA: str.maketrans("T", "U"), DNA: str.maketrans("U", "T")}
"""Databases write RNA with the letters of DNA."""
_SPECIES = {
    "OX=": re.compile(r"\bOX=(\d+)"),
    "TaxID=": re.compile(r"\bTaxID=(\d+)"),
    "the organism in UniRef's names": re.compile(r"^UniRef\w+?_\w+_(\d+)/"),
    "the organism in UniProt's names": re.compile(r"^(?:sp|tr)\|\w+\|\w+_([A-Z0-9]+)"),
}
ROW, COLUMN = "the number of the row", "the file's keys"
_PAIRED_FILE = re.compile(r"(^|(?<!non)(?<!un)[_.-])pair(ed|ing)?([_.-]|$)")
_JOINED = re.compile(rb"#\d+(,\d+)+\t")
"""First line of ColabFold's a3m of several chains: their lengths, and their copies."""


def chains_of(path: Path, entries: Collection[str] = ()) -> tuple[str, str, str]:
    """Read ``4hhb_AC_uniref.a3m.gz`` as entry, chain letters and label.

    Args:
        entries: ids in lower case; one of them that the name begins with is the entry, which may have ``_`` in it.
    """
    stem = Path(path.name.removesuffix(".gz")).stem
    parts = stem.split("_")
    for end in range(len(parts), 0, -1):
        entry = "_".join(parts[:end]).lower()
        if entry in entries:
            return entry, "".join(parts[end : end + 1]), "_".join(parts[end + 1 :])
    prefix = "pdb_" if stem.lower().startswith("pdb_") else ""  # of PDB ids with more than four characters
    entry, chains, label = [*stem[len(prefix) :].split("_", 2), "", ""][:3]
    return prefix + entry.lower(), chains, label


def is_joined(path: Path) -> bool:
    """Whether a file is ColabFold's a3m of several chains, whose sequences stand one behind the other in a row."""
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        return _JOINED.match(file.readline()) is not None


def read_rows(path: Path) -> tuple[list[str], np.ndarray, dict[int, str]]:
    """Sequences of a plain or gzipped a3m or csv file, the query first, their keys (D,) int64, and what those are."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode().replace("\0", "")
    if path.name.removesuffix(".gz").endswith(".csv"):
        sequences, keys = _csv_rows(path, text)
        kinds = dict.fromkeys(keys, COLUMN)
    else:
        headers, sequences = _a3m_rows(text)
        species = [_species(header) for header in headers]
        keys, kinds = [key for key, _ in species], dict(species)
        if _PAIRED_FILE.search(chains_of(path)[2]) and set(keys[1:]) == {UNPAIRED}:
            # Such files of one entry correspond row by row and name no organism.
            keys = [abs(key_of("row", row)) for row in range(len(keys))]
            kinds = dict.fromkeys(keys, ROW)
    if not sequences:
        raise DataError(f"{path.name} holds no sequence")
    return sequences, np.array([UNPAIRED, *keys[1:]], dtype=np.int64), kinds


def _a3m_rows(text: str) -> tuple[list[str], list[str]]:
    headers, sequences = [], []
    for line in text.splitlines():
        if line.startswith(">"):
            headers.append(line[1:].strip())
            sequences.append("")
        elif headers and not line.startswith("#"):
            sequences[-1] += line.strip()
    return headers, sequences


def _csv_rows(path: Path, text: str) -> tuple[list[str], list[int]]:
    rows = list(csv.DictReader(text.splitlines()))
    if rows and not {"key", "sequence"} <= rows[0].keys():
        raise DataError(f"{path.name} lacks the columns key and sequence")
    rows = [row for row in rows if row["sequence"]]
    return [row["sequence"].strip() for row in rows], [file_key(row["key"]) for row in rows]


def file_key(text: str | None) -> int:
    """Key that Boltz's files give a sequence, as a number of ours; empty and -1 mean none."""
    return UNPAIRED if text in (None, "", "-1") else abs(key_of("key", text))


def species_key(header: str) -> int:
    """Key of the organism that a header names (UniProt, UniRef or taxonomy id), ``UNPAIRED`` where it names none."""
    return _species(header)[0]


def _species(header: str) -> tuple[int, str]:
    for kind, pattern in _SPECIES.items():
        if match := pattern.search(header):
            return abs(key_of("species", match[1])), kind
    return UNPAIRED, ""


def read_alignment(path: Path, mol_type: int, letters: str) -> Alignment:
    """Read an alignment and map it to an entity.

    Args:
        mol_type: of the entity.
        letters: (L letters) the entity's sequence, which becomes row 0 whatever the file's own query says; a modified
            residue has its parent's letter.

    Raises:
        DataError: the file's query is another sequence, or a row has another number of columns.
    """
    sequences, keys, kinds = read_rows(path)
    # Some programs end sequences with a stop, or write a query in lower case.
    sequences = [sequence.rstrip("*") for sequence in sequences]
    if sequences[0].islower():
        sequences[0] = sequences[0].upper()
    columns = np.frombuffer(_columns(sequences[0]), np.uint8)
    query_columns = np.flatnonzero(columns != ord("-"))
    own_query = columns[query_columns].tobytes().decode().translate(_SAME_BASE.get(mol_type, {}))
    position = align(own_query, letters)
    same = sum(own_query[i] == letters[p] for i, p in enumerate(position) if p >= 0)
    identity = same / max(1, min(len(own_query), len(letters)))
    if identity < MIN_IDENTITY:
        raise DataError(
            f"{path.name} does not belong to the sequence: {same} of its query's {len(own_query)} residues are found "
            f"among the entity's {len(letters)}"
        )
    table = letter_table(mol_type)
    tokens, deletions = _encode(path, sequences, table)
    tokens, deletions = _on_entity(tokens, deletions, query_columns, position, len(letters))
    tokens[0], deletions[0] = table[np.frombuffer(letters.encode(), np.uint8)], 0
    return Alignment(tokens, deletions, keys, kinds)


def _columns(sequence: str) -> bytes:
    return "".join(c for c in sequence if not c.islower() and c != ".").encode()


def _encode(path: Path, sequences: list[str], table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = len(_columns(sequences[0]))
    tokens = np.empty((len(sequences), width), dtype=np.int8)
    inserted = np.empty((len(sequences), width), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        letters = np.frombuffer(sequence.replace(".", "").encode(), np.uint8)
        lower = (letters >= ord("a")) & (letters <= ord("z"))
        columns = np.flatnonzero(~lower)
        if len(columns) != width:
            raise DataError(f"{path.name}: row {row + 1} has {len(columns)} columns and the query {width}")
        tokens[row] = table[letters[columns]]
        inserted[row] = np.diff(np.cumsum(lower)[columns], prepend=0)
    return tokens, inserted


def _on_entity(
    tokens: np.ndarray, inserted: np.ndarray, query_columns: np.ndarray, position: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Move columns to their positions in the entity; residues in columns without one count as insertions."""
    columns, targets = query_columns[position >= 0], position[position >= 0]
    out = np.full((len(tokens), length), GAP, dtype=np.int8)
    out[:, targets] = tokens[:, columns]
    # Residues of each row up to a column, less those up to the kept column before it and the residue of the column
    # itself, are what the entity has no column for: insertions, and residues in columns that were dropped.
    residues = inserted + (tokens != GAP)
    before = np.cumsum(residues, axis=1)
    up_to = before[:, columns]
    since_last = np.diff(up_to, axis=1, prepend=0) - (tokens[:, columns] != GAP)
    deletions = np.zeros((len(tokens), length), dtype=np.uint8)
    deletions[:, targets] = np.minimum(since_last, 255)
    return out, deletions


def merge(alignments: list[Alignment], max_depth: int) -> Alignment:
    """Concatenate alignments of one entity, drop repeated rows and cap the depth.

    A row without a key is a repetition if an earlier row has the same residues; a row with a key only if that row has
    the same key too, because the same sequence may pair with different partners. Rows with keys come first, and take at
    most half of the depth where there are others to fill the rest.
    """
    joined = Alignment(*(np.concatenate([getattr(a, f) for a in alignments]) for f in ("tokens", "deletions", "keys")))
    for alignment in alignments:
        joined.key_kinds.update(alignment.key_kinds)
    keyed = joined.keys != UNPAIRED
    order = np.concatenate([[0], np.flatnonzero(keyed), 1 + np.flatnonzero(~keyed[1:])])
    seen: set[bytes] = set()
    kept: list[int] = []
    for row in order.tolist():
        content = joined.tokens[row].tobytes() + joined.deletions[row].tobytes()
        with_key = content + int(joined.keys[row]).to_bytes(8, "little", signed=True)
        if (with_key if keyed[row] else content) in seen or (row and (joined.tokens[row] == GAP).all()):
            continue
        seen.update((content, with_key))
        kept.append(row)
    paired = [row for row in kept if keyed[row]]
    others = [row for row in kept if not keyed[row]]
    n_paired = min(len(paired), max(max_depth // 2, max_depth - len(others)))
    rows = [0, *paired[:n_paired], *others[1 : max_depth - n_paired]]
    return joined.take(np.array(rows))
