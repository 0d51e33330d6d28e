"""Two sets of predictions of one truth, before and after a change: by entry, by interface, and in the mean."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from cpfold_train.evaluate.predictions import COLUMNS, Row, best_of, by_entry, cell
from cpfold_train.evaluate.scores import Scores
from cpfold_train.tables import make_table
from cpfold_train.whole_file import whole_file

OF_ENTRY = ("lddt", "tm_score", "rmsd", "interface_lddt")
"""Scores of a whole entry that the table has; those of its interfaces and ligands stand beside these one by one."""
HEADERS = COLUMNS | {"irmsd": "interface RMSD Å", "lrmsd": "smaller chain RMSD Å"}
_COLORS = {"better": "green", "worse": "red"}
_OF_INTERFACE = ("dockq", "fnat", "irmsd", "lrmsd")


class Change(NamedTuple):
    """A score before and after; None where there was nothing to score.

    Attributes:
        id: of the entry.
        score: its name, as in :class:`cpfold_train.evaluate.scores.Scores`.
        chains: of the interface or ligand, as ``A-B``; empty where it is of the entry.
        before, after: its values.
    """

    id: str
    score: str
    chains: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``same``; empty where one of them is not there."""
        if self.difference is None:
            return ""
        if self.difference == 0:
            return "same"
        return "better" if (self.difference < 0) == self.score.endswith("rmsd") else "worse"


def changes(before: list[Row], after: list[Row], best: bool = False) -> list[Change]:
    """All scores of all entries that both sets have.

    Args:
        before, after: samples of the entries.
        best: of the sample with the best lDDT of each; else of the first one, the most confident.
    """
    old, new = by_entry(before), by_entry(after)
    choose = best_of if best else lambda samples: samples[0]
    common = [name for name in old if name in new]
    return [change for name in common for change in _of_entry(name, *(choose(x[name]).scores for x in (old, new)))]


def _of_entry(name: str, before: Scores, after: Scores) -> list[Change]:
    old, new = before.numbers(), after.numbers()
    found = [Change(name, score, "", old[score], new[score]) for score in COLUMNS]
    for chains, pairs in _both(before.interfaces, after.interfaces, "chains").items():
        found += [Change(name, score, chains, *(pair.get(score) for pair in pairs)) for score in _OF_INTERFACE]
    for chain, pairs in _both(before.ligands, after.ligands, "chain").items():
        found.append(Change(name, "ligand_rmsd", chain, *(ligand.get("rmsd") for ligand in pairs)))
    return [change for change in found if (change.before, change.after) != (None, None)]


def _both(before: list[dict], after: list[dict], key: str) -> dict[str, tuple[dict, dict]]:
    """What each list has of a name; nothing where it does not have it."""
    old, new = ({entry[key]: entry for entry in entries} for entries in (before, after))
    return {name: (old.get(name, {}), new.get(name, {})) for name in dict.fromkeys([*old, *new])}


def means(found: Iterable[Change]) -> list[tuple[Change, int, int]]:
    """Mean of each score of entries over those that have it in both sets; in how many it is better, and of how many."""
    both = [change for change in found if not change.chains and change.difference is not None]
    summary = []
    for score in COLUMNS:
        if own := [change for change in both if change.score == score]:
            before = mean(change.before for change in own if change.before is not None)
            after = mean(change.after for change in own if change.after is not None)
            mean_of = Change("mean", score, "", before, after)
            summary.append((mean_of, sum(change.verdict == "better" for change in own), len(own)))
    return summary


def differences_table(first: list[Change], best: list[Change] | None) -> Table:
    """Before and after side by side, by entry and interface, and the means.

    Args:
        first: of the first sample of each entry.
        best: of the best sample of each; None where no entry has several.
    """
    caption = "first: the most confident sample of each entry; best: that with the best lDDT"
    table = make_table("id, score, before, after, difference, after is", text="id, score, after is", caption=caption)
    table.columns[0].overflow, table.columns[0].min_width = "fold", len("mean, first")
    last = ""
    for change in first:
        if change.score in (OF_ENTRY if not change.chains else ("dockq", "ligand_rmsd")):
            if last and change.id != last:
                table.add_section()
            told = Text(change.verdict, _COLORS.get(change.verdict, ""))
            table.add_row(change.id if change.id != last else "", *_cells(change), told)
            last = change.id
    for name, found in (("mean, first", first), ("mean, best", best)):
        table.add_section()
        for change, better, count in means(found or []):
            table.add_row(
                name, *_cells(change), Text(f"better in {better} of {count}", _COLORS.get(change.verdict, ""))
            )
            name = ""
    return table


def write_differences(path: Path, found: list[Change]) -> None:
    """A row for each score of each entry, interface and ligand."""
    with whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "score", "chains", "before", "after", "difference", "after_is"])
        writer.writerows([*change, change.difference, change.verdict] for change in found)


def _cells(change: Change) -> tuple[str, str, str, str]:
    sign = "+" if (change.difference or 0) > 0 else ""
    difference = cell(change.score, change.difference)
    named = f"{HEADERS[change.score]} {change.chains}".strip()
    return named, cell(change.score, change.before), cell(change.score, change.after), difference and sign + difference
