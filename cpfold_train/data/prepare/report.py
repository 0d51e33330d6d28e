"""What was kept, dropped and why: a file, a table, a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from cpfold_train.data.alignments.pairing import REMEDY
from cpfold_train.data.prepare.convert import Conversion
from cpfold_train.tables import make_console, make_table, print_whole
from cpfold_train.whole_file import whole_file

LONGEST_TABLE = 100
"""Entries up to which the terminal shows each."""

_SHOWN = 10


def write_report(
    out: Path,
    results: list[Conversion],
    chosen: dict[str, str],
    clusters: int,
    shared: list[str],
    unused: list[str],
    tars: list[str],
) -> None:
    """Write ``report.json`` and ``report.png`` and print a table.

    Args:
        results: of all entries, kept or dropped.
        chosen: split of those that are kept.
        clusters: how many there are.
        shared: validation entries that resemble training entries.
        unused: alignment and template files without an entry.
        tars: names of the shards.
    """
    kept = [result for result in results if result.dropped is None]
    report = {
        "kept": len(kept),
        "train": sum(side == "train" for side in chosen.values()),
        "val": sum(side == "val" for side in chosen.values()),
        "dropped": len(results) - len(kept),
        "clusters": clusters,
        "totals": _total(result.counts for result in kept),
        "left_out_residues": _total(result.left_out for result in kept),
        "removed_chains": _total(result.removed for result in kept),
        "shards": tars,
        "val_similar_to_train": shared,
        "unused_files": unused,
        "entries": [_described(result, chosen) for result in results],
    }
    with whole_file(out / "report.json") as file:
        file.write(json.dumps(report, indent=1) + "\n")
    if kept:
        draw(out / "report.png", kept)
    console = make_console()
    if len(results) > LONGEST_TABLE:
        print_whole(console, _summary(results))
    else:
        print_whole(console, _table(results, chosen))
        for result in kept:
            for sentence in result.pairing:
                console.print(escape(f"{result.key}: {sentence}"), soft_wrap=True)
    console.print(_headline(report))
    if unused:
        console.print(f"alignments or templates without an entry: {escape(_some(unused))}")
    if shared:
        console.print(f"[yellow]validation entries that resemble training entries: {escape(_some(shared))}[/]")
    console.print(f"{len(tars)} shards, report.json and report.png in {out}")


def _described(result: Conversion, chosen: dict[str, str]) -> dict:
    values = {name: value for name, value in asdict(result).items() if value and name != "entities"}
    return values | ({"split": chosen[result.key]} if result.key in chosen else {})


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _headline(report: dict) -> str:
    totals = report["totals"]
    return (
        f"{report['kept']:,} of {report['kept'] + report['dropped']:,} entries kept "
        f"({report['train']:,} train, {report['val']:,} val), {totals.get('residues', 0):,} residues, "
        f"{totals.get('tokens', 0):,} tokens, {report['clusters']:,} clusters"
    )


def _table(results: list[Conversion], chosen: dict[str, str]) -> Table:
    table = make_table("entry, tokens, residues, chains, ligands, MSA, notes", text="entry, notes", whole="entry")
    for result in results:
        counts = [result.counts.get(name) for name in ("tokens", "residues", "chains", "ligands")]
        cells = ["" if number is None else f"{number:,}" for number in counts]
        cells.append(f"{max(result.msa_depth.values()):,}" if result.msa_depth else "")
        notes = [f"{count} {reason}" for reason, count in (result.left_out | result.removed).items()] + result.problems
        why = f"[red]dropped[/]: {escape(result.dropped)}" if result.dropped else escape("; ".join(notes))
        table.add_row(result.key + (" (val)" if chosen.get(result.key) == "val" else ""), *cells, why)
    return table


def _summary(results: list[Conversion]) -> Table:
    """Counts by reason, each with the first entry that it is about; numbers in a reason do not tell reasons apart."""
    table = make_table("what, count, first", text="what, first")
    firsts: dict[str, str] = {}
    counts: Counter = Counter()
    for result in results:
        if result.dropped:
            words = result.dropped.replace(result.source, "FILE").split()
            reason = "dropped: " + " ".join("N" if word[0].isdigit() else word for word in words)
            counts[reason] += 1
            firsts.setdefault(reason, f"{result.key}: {result.dropped}")
        for kind, by_reason in (("chains removed", result.removed), ("residues left out", result.left_out)):
            for reason, count in by_reason.items():
                counts[f"{kind}: {reason}"] += count
                firsts.setdefault(f"{kind}: {reason}", result.key)
        if result.dropped is None and any(REMEDY in sentence for sentence in result.pairing):
            counts["alignments of different chains cannot pair"] += 1
            firsts.setdefault("alignments of different chains cannot pair", f"{result.key}: {REMEDY}")
        for problem in result.problems:
            counts["problems with alignments or templates"] += 1
            firsts.setdefault("problems with alignments or templates", problem)
    for reason, count in sorted(counts.items(), key=lambda item: (not item[0].startswith("dropped"), -item[1])):
        table.add_row(escape(reason), f"{count:,}", escape(firsts[reason]))
    return table


def draw(path: Path, kept: list[Conversion]) -> None:
    """Histograms of sizes, resolutions, release years and MSA depths."""
    from matplotlib.figure import Figure

    sizes = np.array([result.counts["tokens"] for result in kept], dtype=float)
    depths = np.array([rows for result in kept for rows in result.msa_depth.values()], dtype=float)
    years = np.array([int(result.release_date[:4]) for result in kept if result.release_date])
    resolutions = np.array([result.resolution for result in kept if result.resolution is not None])
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = (
        ("tokens", sizes, True, "entries"),
        ("resolution (Å)", resolutions, False, "entries"),
        ("year of release", years, False, "entries"),
        ("MSA rows", depths, True, "entities with an MSA"),
    )
    for axis, (name, values, logarithmic, unit) in zip(figure.subplots(2, 2).flat, panels):
        if len(values):
            low, high = values.min(), values.max()
            if logarithmic:
                bins = np.geomspace(max(low, 1), high * 1.001, 30) if high > low else 1
                axis.set_xscale("log")
            else:
                bins = np.arange(low, high + 2) - 0.5 if name.startswith("year") else 30
            axis.hist(values, bins=bins, color="#4477aa", edgecolor="white", linewidth=0.5)
        axis.set(xlabel=name, ylabel=unit, title=f"{len(values):,} {unit}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
