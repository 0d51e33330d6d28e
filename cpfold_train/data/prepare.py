"""``python -m cpfold_train prepare IN OUT``: structure files and alignments to shards."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpfold_train.data.a3m import chains_of, merge, read_alignment
from cpfold_train.data.alignment import Alignment, pack_alignments
from cpfold_train.data.parse import SUFFIXES, chain_letters, entry_id, read_structure
from cpfold_train.data.residues import MOL_TYPES
from cpfold_train.data.shards import write_shard
from cpfold_train.data.structure import Structure, pack_arrays, pack_structure
from cpfold_train.errors import ConfigError, DataError


@dataclass
class Result:
    """What became of one file: a sample, or the reason why not."""

    key: str
    source: str
    members: dict[str, bytes] | None = None
    dropped: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    alignment_rows: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="IN", help="folders or files: mmCIF, BinaryCIF, PDB, .gz"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards, made if it is not there")
    parser.add_argument("--msa", type=Path, metavar="DIR", help="a3m files named ENTRY_CHAINS_LABEL.a3m[.gz]")
    parser.add_argument("--only", metavar="ID,ID", help="take these entries of IN and no others")
    parser.add_argument(
        "--val", default="", metavar="ID,ID", help="entries that go to val-*.tar instead of train-*.tar"
    )
    parser.add_argument("--min-residues", type=int, default=16, metavar="N", help="drop entries below (default: 16)")
    parser.add_argument("--max-residues", type=int, metavar="N", help="drop entries above (default: no limit)")
    parser.add_argument("--max-msa-depth", type=int, default=16384, metavar="N", help="rows an entity (default: 16384)")
    parser.add_argument("--shard-size", type=float, default=256, metavar="MB", help="size of a tar (default: 256)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)"
    )


def run(args: argparse.Namespace) -> None:
    """Carry out the subcommand: write the shards, ``report.json`` and a table on the terminal."""
    if args.max_msa_depth < 1 or args.shard_size <= 0 or args.workers < 1:
        raise ConfigError("--max-msa-depth, --shard-size and --workers start at 1: type for example --workers 2")
    val = _ids(args.val)
    files = _find_files(args.inputs, _ids(args.only) if args.only else None, val)
    alignments = _find_alignments(args.msa)
    args.out.mkdir(parents=True, exist_ok=True)
    convert = partial(
        _convert, min_residues=args.min_residues, max_residues=args.max_residues, depth=args.max_msa_depth
    )
    jobs = [(path, alignments.pop(entry_id(path), [])) for path in files]
    results = []
    writers = {split: _Writer(args.out, split, args.shard_size * 1e6) for split in ("train", "val")}
    for result in track(_map(convert, jobs, args.workers), "preparing", total=len(jobs), transient=True):
        if result.members is not None:
            writers["val" if result.key in val else "train"].add(result.key, result.members)
            result.members = None
        results.append(result)
    for writer in writers.values():
        writer.flush()
    unused = sorted(path.name for paths in alignments.values() for path in paths)
    _report(args.out, results, unused, [tar for writer in writers.values() for tar in writer.tars])


def _map(convert: partial, jobs: list, workers: int) -> Iterator[Result]:
    if workers == 1:
        yield from map(convert, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(convert, jobs)


class _Writer:
    """Collects the samples of one split and writes a tar whenever enough have come together."""

    def __init__(self, out: Path, split: str, max_bytes: float) -> None:
        self.out, self.split, self.max_bytes = out, split, max_bytes
        self.samples: list[tuple[str, dict[str, bytes]]] = []
        self.bytes = 0
        self.tars: list[str] = []

    def add(self, key: str, members: dict[str, bytes]) -> None:
        self.samples.append((key, members))
        self.bytes += sum(map(len, members.values()))
        if self.bytes >= self.max_bytes:
            self.flush()

    def flush(self) -> None:
        if self.samples:
            path = self.out / f"{self.split}-{len(self.tars):06d}.tar"
            write_shard(path, self.samples)
            self.tars.append(path.name)
        self.samples, self.bytes = [], 0


def _ids(text: str) -> set[str]:
    return {name.strip().lower() for name in text.split(",") if name.strip()}


def _find_files(inputs: list[Path], only: set[str] | None, val: set[str]) -> list[Path]:
    found: dict[str, Path] = {}
    for given in inputs:
        if not given.exists():
            raise ConfigError(f"{given} does not exist: type the path of a folder or file with structures")
        for path in sorted(given.rglob("*")) if given.is_dir() else [given]:
            if not path.name.removesuffix(".gz").lower().endswith(SUFFIXES):
                continue
            key = entry_id(path)
            if key in found:
                raise ConfigError(f"{found[key]} and {path} would both become sample {key}: leave one of them out")
            found[key] = path
    if only is not None:
        val = val | only
    missing = sorted(val - set(found))
    if missing:
        raise ConfigError(f"no structure file for {', '.join(missing)} in {', '.join(map(str, inputs))}: check the ids")
    keys = sorted(key for key in found if only is None or key in only)
    if not keys:
        raise ConfigError(f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, inputs))}: type another folder")
    return [found[key] for key in keys]


def _find_alignments(folder: Path | None) -> dict[str, list[Path]]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError(f"--msa {folder} is not a folder: type the path of a folder with .a3m or .a3m.gz files")
    by_entry: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.removesuffix(".gz").endswith(".a3m"):
            by_entry.setdefault(chains_of(path)[0], []).append(path)
    return by_entry


def _convert(job: tuple[Path, list[Path]], min_residues: int, max_residues: int | None, depth: int) -> Result:
    path, files = job
    result = Result(key=entry_id(path), source=path.name)
    try:
        structure, left_out = read_structure(path)
    except DataError as error:
        result.dropped = str(error)
        return result
    result.counts, result.left_out = structure.meta["counts"], {k: v for k, v in sorted(left_out.items()) if v}
    tokens = len(structure)
    if tokens < min_residues:
        result.dropped = f"{tokens} residues are fewer than --min-residues {min_residues}"
    elif max_residues is not None and tokens > max_residues:
        result.dropped = f"{tokens} residues are more than --max-residues {max_residues}"
    elif not structure.center[1].any():
        result.dropped = "no residue has coordinates"
    if result.dropped:
        return result
    alignments = _align_entities(structure, files, depth, result.problems)
    result.alignment_rows = {str(entity): len(alignment) for entity, alignment in alignments.items()}
    structure.meta["msa_depth"] = result.alignment_rows
    result.members = pack_structure(structure)
    if alignments:
        result.members["msa.npz"] = pack_arrays(pack_alignments(alignments))
    return result


def _align_entities(structure: Structure, files: list[Path], depth: int, problems: list[str]) -> dict[int, Alignment]:
    """Alignments by entity. A file counts for the entities of the chains that its name lists."""
    found: dict[int, list[Alignment]] = {}
    for path in files:
        entities = _entities_of(path, structure)
        if not entities:
            problems.append(f"{path.name}: the entry has no such chain")
        for entity in entities:
            asym_id = next(i for i, chain in enumerate(structure.meta["chains"]) if chain["entity"] == entity)
            query = structure.res_type[structure.asym_id == asym_id]
            mol_type = MOL_TYPES.index(structure.meta["chains"][asym_id]["type"])
            letters = chain_letters(structure, asym_id)
            try:
                found.setdefault(entity, []).append(read_alignment(path, mol_type, letters, query))
            except (DataError, OSError, UnicodeDecodeError) as error:
                problems.append(str(error))
    return {entity: merge(alignments, depth) for entity, alignments in sorted(found.items()) if alignments}


def _entities_of(path: Path, structure: Structure) -> list[int]:
    """Entities of the chains in a file name. ``AC`` means the chains A and C, unless a chain is itself called AC."""
    polymers = (chain for chain in structure.meta["chains"] if chain["type"] != "nonpolymer")
    chains = {chain["auth_name"]: chain["entity"] for chain in polymers}
    names = chains_of(path)[1]
    listed = [names] if names in chains else list(names)
    return list(dict.fromkeys(chains[name] for name in listed if name in chains))


def _report(out: Path, results: list[Result], unused: list[str], tars: list[str]) -> None:
    kept = [result for result in results if result.dropped is None]
    totals: Counter = Counter()
    for result in kept:
        totals.update(result.counts)
    left_out: Counter = Counter()
    for result in kept:
        left_out.update(result.left_out)
    report = {
        "kept": len(kept),
        "dropped": len(results) - len(kept),
        "totals": dict(totals),
        "left_out_residues": dict(left_out),
        "shards": tars,
        "unused_alignments": unused,
        "entries": [
            {name: value for name, value in vars(result).items() if name != "members" and value} for result in results
        ],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title=f"{len(kept)} of {len(results)} entries kept, {totals['tokens']:,} tokens")
    for column in ("entry", "residues", "resolved", "chains", "alignment rows", "left out, or why it was dropped"):
        table.add_column(column, justify="right" if column in ("residues", "resolved", "chains") else "left")
    for result in results:
        rows = ", ".join(f"{entity}: {rows}" for entity, rows in result.alignment_rows.items())
        notes = [f"{count} {reason}" for reason, count in result.left_out.items()] + result.problems
        counts = [str(result.counts.get(name, "")) for name in ("tokens", "resolved", "chains")]
        table.add_row(
            result.key, *counts, rows, f"[red]dropped[/]: {result.dropped}" if result.dropped else "; ".join(notes)
        )
    console = Console()
    console.print(table)
    if unused:
        console.print(f"alignments without an entry: {', '.join(unused)}")
    console.print(f"{len(tars)} shards and report.json in {out}")
