"""``python -m cpfold_train inspect SHARDS [ID]``: what is in shards."""

from __future__ import annotations

import argparse
import glob
from collections import Counter
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.alignments.pairing import chain_label, told_pairing
from cpfold_train.data.inspect.picture import draw_sample
from cpfold_train.data.stream.shards import StoredSample, open_shards, read_sample
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import ConfigError
from cpfold_train.tables import make_console, make_table, print_whole
from cpfold_train.vocabulary import BOND_TYPES

LONGEST_TABLE = 100
"""Samples that are listed one by one; the totals are always of all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("shards", metavar="SHARDS", help="a .tar file, a folder of them, or a quoted glob")
    parser.add_argument("id", nargs="?", metavar="ID", help="describe and draw this sample")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: ID.png)")
    parser.add_argument(
        "--crop", type=int, nargs="+", default=[256, 1024], metavar="N", help="crops to draw (default: 256 1024)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table of all samples, or the tables of one and draw it.

    Raises:
        ConfigError: there are no such shards, or no such sample.
        DataError: a shard or the sample is damaged.
    """
    if min(args.crop) < 1:
        raise ConfigError("a crop has at least one token: type for example --crop 1024")
    entries = open_shards([f"{glob.escape(args.shards)}/*.tar" if Path(args.shards).is_dir() else args.shards])
    console = make_console()
    if args.id is None:
        print_whole(console, samples_table(entries))
        return
    entry = next((entry for entry in entries if entry.key == args.id.lower()), None)
    if entry is None:
        raise ConfigError(f"no sample {args.id} in {args.shards}: leave the id out to see which there are")
    structure, alignments, _ = read_sample(entry)
    for table in (chains_table(entry.key, structure, alignments), components_table(structure)):
        print_whole(console, table)
    # Shards from before have the numbers, but not what the keys are.
    for sentence in structure.meta.get("pairing") or told_pairing(structure.meta["chains"], alignments):
        console.print(escape(sentence), soft_wrap=True)
    out = args.out or Path(f"{entry.key}.png")
    draw_sample(out, structure, alignments, args.crop)
    console.print(f"picture in {out}")


def samples_table(entries: list[StoredSample]) -> Table:
    """A row for each sample, by the index alone."""
    chains = [chain for entry in entries for chain in entry.chains]
    polymers = [chain for chain in chains if chain["type"] != "nonpolymer"]
    table = make_table(
        "id, tokens, chains, residues, resolved, ligands, MSA rows, Å, released, clusters",
        text="id, released",
        whole="id, released",
        title=f"{len(entries):,} samples, {sum(entry.tokens for entry in entries):,} tokens, "
        f"{len(polymers):,} polymer chains, {len(chains) - len(polymers):,} ligands, "
        f"{len({chain['cluster'] for chain in chains}):,} clusters",
    )
    for entry in entries[:LONGEST_TABLE]:
        own = [chain for chain in entry.chains if chain["type"] != "nonpolymer"]
        numbers = (
            entry.tokens,
            len(own),
            sum(chain["length"] for chain in own),
            sum(chain["observed"] for chain in own),
            len(entry.chains) - len(own),
            entry.msa_rows,
        )
        resolution = "" if entry.resolution is None else f"{entry.resolution:.2f}"
        clusters = len({chain["cluster"] for chain in entry.chains})
        table.add_row(
            entry.key, *(f"{number:,}" for number in numbers), resolution, entry.release_date or "", f"{clusters}"
        )
    if len(entries) > LONGEST_TABLE:
        table.caption = f"and {len(entries) - LONGEST_TABLE:,} more"
    return table


def chains_table(key: str, structure: Structure, alignments: dict[int, Alignment]) -> Table:
    """A row for each polymer chain, and one for the ligands of each kind."""
    meta = structure.meta
    resolution = None if meta["resolution"] is None else f"{meta['resolution']:g} Å"
    released = None if meta["release_date"] is None else f"released {meta['release_date']}"
    table = make_table(
        "chain, type, entity, copy, residues, resolved, numbers, MSA, cluster",
        text="chain, type, cluster",
        whole="chain, type, numbers, cluster",
        title=escape(f"{key}: {meta['title'] or ''}"),
        caption=escape(", ".join(filter(None, (meta["method"], resolution, released)))),
    )
    ligands: dict[int, list[dict]] = {}
    for chain in meta["chains"]:
        if chain["type"] == "nonpolymer":
            ligands.setdefault(chain["entity"], []).append(chain)
            continue
        rows = len(alignments[chain["entity"]]) if chain["entity"] in alignments else 0
        cells = (
            str(chain["entity"]),
            str(chain["sym"]),
            f"{chain['length']:,}",
            f"{chain['observed']:,}",
            _numbers(chain),
            f"{rows:,}" if rows else "",
        )
        table.add_row(chain_label(chain), chain["type"], *cells, escape(chain["cluster"]))
    for entity, chains in ligands.items():
        first = chain_label(chains[0])
        name = first if len(chains) == 1 else f"{first} and {len(chains) - 1} more"
        cells = (str(entity), "", str(chains[0]["length"]), str(chains[0]["observed"]), "", "")
        table.add_row(name, "ligand", *cells, escape(chains[0]["cluster"]))
    return table


def _numbers(chain: dict) -> str:
    """First and last resolved residue, from 0, and the author's numbers of these, which older shards lack."""
    if "auth_numbers" not in chain:
        return ""
    (first, author_first), (last, author_last) = chain["auth_numbers"]
    return f"{first}-{last} ({author_first}-{author_last})"


def components_table(structure: Structure) -> Table:
    """The components other than standard residues, and the bonds that are stored."""
    kinds = Counter(BOND_TYPES[kind] for kind in structure.bond_type.tolist())
    bonds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())) or "none"
    table = make_table(
        "component, atoms, ligand residues, modified residues", text="component", title=f"bonds: {bonds}"
    )
    first = np.diff(structure.component, prepend=-1) != 0
    first |= np.diff(structure.res_index, prepend=-1) != 0
    first |= np.diff(structure.asym_id, prepend=-1) != 0
    for number, name in enumerate(structure.comp_name.astype(str).tolist()):
        here = first & (structure.component == number)
        ligands, modified = int((here & ~structure.polymer).sum()), int((here & structure.modified).sum())
        if ligands or modified:
            atoms = structure.comp_start[number + 1] - structure.comp_start[number]
            table.add_row(name, str(atoms), f"{ligands:,}", f"{modified:,}")
    return table
