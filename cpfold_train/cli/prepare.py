"""``python -m cpfold_train prepare IN OUT``: structure files and alignments to shards."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

from rich.progress import track

from cpfold_train.data.prepare.clusters import entity_clusters
from cpfold_train.data.prepare.convert import Conversion, Job, Options
from cpfold_train.data.prepare.download import WWPDB
from cpfold_train.data.prepare.filters import Limits
from cpfold_train.data.prepare.msas import find_alignments
from cpfold_train.data.prepare.report import write_report
from cpfold_train.data.prepare.sources import find_sources, names
from cpfold_train.data.prepare.splits import Clusters, shared_clusters, split
from cpfold_train.data.prepare.templates import find_templates
from cpfold_train.data.prepare.work import convert_all, members_size, read_members
from cpfold_train.data.stream.shards import index_path, write_shard
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.interrupts import answer_interrupts, leave_interrupts, quit_now


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="folders, files (mmCIF, BinaryCIF, PDB, .gz) or .txt lists of them, a "
        "folder in Boltz's processed format, or PDB ids to download")  # fmt: skip
    add("out", type=Path, metavar="OUT", help="folder for the shards, made if it is not there")
    add("--only", default="", metavar="ID,ID", help="take these entries of IN and no others")
    add("--skip", default="", metavar="ID,ID", help="leave these entries out")
    add(
        "--assembly", metavar="N", help="build this biological assembly, such as 1 (default: the deposited coordinates)"
    )
    add("--overwrite", action="store_true", help="replace the shards that OUT already holds")
    add("--shard-size", type=float, default=256, metavar="MB", help="size of a tar (default: 256)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")

    add = parser.add_argument_group("download").add_argument
    add("--download", type=Path, metavar="DIR", help="fetch PDB ids among the inputs into this folder")
    add("--source", default=WWPDB, metavar="URL", help=f"where to fetch ID.cif.gz (default: {WWPDB})")

    add = parser.add_argument_group("alignments").add_argument
    add("--msa", type=Path, metavar="DIR", help="files ENTRY_CHAINS_LABEL.a3m or .csv, .gz or not (Boltz: MSA_ID.npz)")
    add("--msa-map", type=Path, metavar="FILE", help="tab-separated lines of entry, chain and path of an alignment")
    add("--max-msa-depth", type=int, default=16384, metavar="N", help="rows an entity (default: 16384)")

    add = parser.add_argument_group("templates").add_argument
    add("--templates", type=Path, metavar="FILE", help="tab-separated lines of entry, chain, path of a template "
        "structure and chain of the template")  # fmt: skip

    add = parser.add_argument_group("filters").add_argument
    add("--before", metavar="DATE", help="take entries released before this date, such as 2021-10-01")
    add("--after", metavar="DATE", help="take entries released after this date")
    add("--max-resolution", type=float, metavar="A", help="drop entries with a worse one, in Angstrom")
    add("--min-residues", type=int, default=16, metavar="N", help="of polymers (default: 16)")
    add("--max-residues", type=int, metavar="N", help="of polymers (default: no limit)")
    add("--min-tokens", type=int, default=0, metavar="N", help="residues and ligand atoms (default: no limit)")
    add("--max-tokens", type=int, metavar="N", help="residues and ligand atoms (default: no limit)")
    add("--max-chains", type=int, default=300, metavar="N", help="polymer chains (default: 300)")
    add("--max-unknown", type=float, default=1.0, metavar="F", help="fraction of unknown residues (default: 1)")
    add("--exclude-ligands", default="", metavar="CCD,CCD", help="remove these components wherever they are ligands")
    add("--keep-crystal-aids", action="store_true", help="keep glycerol, sulphate and the like in crystals")

    add = parser.add_argument_group("clusters and validation").add_argument
    add("--clusters", type=Path, metavar="FILE", help="ENTRY_CHAIN or sequence SHA-256, and cluster, tab-separated; or "
        "Boltz's manifest.json (default: 40 %% identity, by mmseqs if it is installed)")  # fmt: skip
    add("--val", default="", metavar="ID,ID", help="entries that go to val-*.tar instead of train-*.tar")
    add(
        "--val-after", metavar="DATE", help="validate on entries released later, if no polymer resembles a training one"
    )
    add("--val-fraction", type=float, metavar="F", help="validate on this part of the entries, by whole clusters")


def run(args: argparse.Namespace) -> None:
    """Carry out the subcommand: write the shards, ``report.json`` and ``report.png``, and a table on the terminal.

    Raises:
        ConfigError: an option cannot work.
        DataError: a worker process died, or no entry was kept.
    """
    _check(args)
    val = names(args.val)
    only = names(args.only)
    sources, failed = find_sources(args.inputs, only, names(args.skip), args.download, args.source)
    absent = sorted(val - {source.key for source in sources})
    if absent:
        raise ConfigError(f"no structure file for {', '.join(absent)}, which --val names: check the ids")
    alignments = find_alignments(args.msa, args.msa_map, {source.key for source in sources})
    templates = find_templates(args.templates)
    jobs = [
        Job(source, tuple(alignments.pop(source.key, [])), tuple(templates.pop(source.key, []))) for source in sources
    ]
    work = _work_folder(args.out, args.overwrite)
    options = Options(args.assembly, _limits(args), args.max_msa_depth, args.msa)
    converted = track(convert_all(jobs, options, work, args.workers), "preparing", total=len(jobs), transient=True)
    interrupt = partial(quit_now, "interrupted: run the same command again to go on from here")
    answer_interrupts(interrupt)
    results = sorted(converted, key=lambda result: result.key)
    leave_interrupts(interrupt)
    kept = [result for result in results if result.dropped is None]
    clusters = entity_clusters(kept, args.clusters)
    chosen, excluded = split(kept, clusters, val, args.val_after, args.val_fraction)
    for result in kept:
        result.dropped = excluded.get(result.key)
    results += [Conversion(key, f"{key}.cif.gz", dropped=reason) for key, reason in failed.items()]
    tars = _write_shards(args.out, work, chosen, clusters, args.shard_size * 1e6)
    left = [*alignments.values(), *templates.values()]
    unused = [] if only else sorted(path.name for files in left for path, _ in files)
    shared = shared_clusters(kept, clusters, chosen)
    n_clusters = len({cluster for (key, _), cluster in clusters.items() if key in chosen})
    write_report(args.out, sorted(results, key=lambda result: result.key), chosen, n_clusters, shared, unused, tars)
    shutil.rmtree(work)
    if not chosen:
        raise DataError(f"no entry was kept: {args.out / 'report.json'} says why")


def _check(args: argparse.Namespace) -> None:
    if args.max_msa_depth < 1 or args.shard_size <= 0 or args.workers < 1:
        raise ConfigError("--max-msa-depth, --shard-size and --workers start at 1: type for example --workers 2")
    if args.val_after and args.val_fraction is not None:
        raise ConfigError("--val-after and --val-fraction are two ways to choose: type one of them")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise ConfigError(f"--val-fraction {args.val_fraction:g} is not between 0 and 1: type for example 0.05")
    for option in ("before", "after", "val_after"):
        given = getattr(args, option)
        try:
            date.fromisoformat(given or "2000-01-01")
        except ValueError:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} {given} is not a date: type for example --{name} 2021-09-30") from None


def _limits(args: argparse.Namespace) -> Limits:
    return Limits(
        before=args.before,
        after=args.after,
        max_resolution=args.max_resolution,
        min_residues=args.min_residues,
        max_residues=args.max_residues,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        max_chains=args.max_chains,
        max_unknown=args.max_unknown,
        keep_crystal_aids=args.keep_crystal_aids,
        exclude_ligands=tuple(sorted(name.upper() for name in names(args.exclude_ligands))),
    )


def _work_folder(out: Path, overwrite: bool) -> Path:
    """``OUT/.work``, there from the start of a run until its shards are complete."""
    work = out / ".work"
    if not work.exists() and not overwrite and list(out.glob("*.tar")):
        raise ConfigError(f"{out} already holds shards: type another folder, or --overwrite to replace them")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _write_shards(out: Path, work: Path, chosen: dict[str, str], clusters: Clusters, size: float) -> list[str]:
    """Write the tars of both splits, each of ``size`` bytes or a little more, in the order of the keys."""
    tars = []
    for side in ("train", "val"):
        for old in out.glob(f"{side}-[0-9]*.tar"):
            index_path(old).unlink(missing_ok=True)
            old.unlink()
        keys = [key for key in sorted(chosen) if chosen[key] == side]
        for number, together in enumerate(_by_size(work, keys, size)):
            tar = f"{side}-{number:06d}.tar"
            write_shard(out / tar, _samples(work, together, clusters))
            tars.append(tar)
    return tars


def _by_size(work: Path, keys: list[str], size: float) -> Iterator[list[str]]:
    together, total = [], 0
    for key in keys:
        together.append(key)
        total += members_size(work, key)
        if total >= size:
            yield together
            together, total = [], 0
    if together:
        yield together


def _samples(work: Path, keys: list[str], clusters: Clusters) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples with the clusters of their chains, which are known only when all entries are."""
    for key in keys:
        members = read_members(work, key)
        meta = json.loads(members["json"])
        for chain in meta["chains"]:
            chain["cluster"] = clusters[key, chain["entity"]]
        yield key, {**members, "json": json.dumps(meta, indent=1, sort_keys=True).encode()}
