"""The end of a run on the terminal: what it did, what got better, what was left out, and what to type next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpfold_train.data.stream.quarantine import read_quarantine
from cpfold_train.reports.course import course, trend, verdict
from cpfold_train.reports.metrics import METRICS
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.progress import clock
from cpfold_train.reports.result_file import read_result
from cpfold_train.reports.shell import command, pasted, shown
from cpfold_train.tables import make_block, make_table

_NAMED = 5
"""Unusable samples that are named; the file has all."""
_COLORS = {"better": "green", "worse": "red", "same": ""}


@dataclass(frozen=True)
class Ending:
    """What a run knows of its end beside its files.

    Attributes:
        steps_here: optimizer steps since it was started, without those before a resume.
        reason: why it has ended, where that is no limit that was typed; else empty.
        longer: the key that lets it go on, such as ``trainer.max_steps=300``; empty where none was its limit.
        best: the best checkpoint, where there is one.
        inputs: what a prediction would be made of: shards of validation, or of training where there are none.
    """

    steps_here: int
    reason: str
    longer: str
    best: Path | None
    inputs: list[str]


def print_ending(run_dir: Path, ending: Ending, console: Console) -> None:
    """Print all of it.

    Args:
        run_dir: holds ``metrics.csv`` and ``result.json``.
        ending: what these do not say.
        console: where to.
    """
    rows, result = read_metrics(run_dir / "metrics.csv"), read_result(run_dir)
    console.print()
    if ending.reason:
        console.print(ending.reason, soft_wrap=True, highlight=False, markup=False)
    if rows:
        console.print(_changes(rows))
    console.print(make_block(_facts(run_dir, result, ending)))
    console.print()
    for what, words in next_commands(run_dir, ending):
        console.print(Text(what, "bold"))
        # A line that was broken here could not be pasted.
        text = pasted(words, console.width - 2).replace("\n", "\n  ")
        console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False)


def _changes(rows: list[dict[str, str]]) -> Table:
    """What got better or worse since the start. Losses of training are means over some steps."""
    table = make_table("metric, first, best, at step, last, since the start", text="metric, since the start")
    for name, metric in METRICS.items():
        if not metric.summarised:
            continue
        if name.startswith("val/"):
            if (found := course(rows, name)) is None:
                continue
            ends, middle = (found.first, found.last), (f"{found.best:.4f}", str(found.best_step))
        else:
            if (means := trend(rows, name)) is None:
                continue
            ends, middle = means, ("", "")
        changed = verdict(name, *ends)
        table.add_row(name, f"{ends[0]:.4f}", *middle, f"{ends[1]:.4f}", Text(changed, _COLORS[changed]))
    return table


def _facts(run_dir: Path, result: dict[str, Any], ending: Ending) -> list[tuple[str, str]]:
    steps, here = result.get("steps", 0), ending.steps_here
    made = f"{steps} step{'s' * (steps != 1)}" + (f", {here} of them now" if here != steps else "")
    facts = [("steps", f"{made}, in {clock(result.get('seconds', 0))}")]
    if not (here or ending.reason):
        facts = [("steps", f"no step was made: step {steps} is at a limit")]
    if skipped := result.get("skipped"):
        facts.append(("skipped steps", f"{skipped}, without a finite gradient or without memory"))
    if unusable := result.get("quarantined"):
        listed = run_dir / "quarantine.jsonl"
        keys = list(dict.fromkeys(str(line["key"]) for line in read_quarantine(listed)))
        named = f" ({', '.join([*keys[:_NAMED], *['...'] * (len(keys) > _NAMED)])}), listed in {shown(listed)}"
        facts.append(("unusable samples", f"{unusable}{named if keys else ''}"))
    if left_out := result.get("left_out"):
        which = ", ".join(f"{count} of {name}" for name, count in left_out.items())
        facts.append(("left out", f"crops of validation without a pair to score: {which}"))
    last = run_dir / "checkpoints" / "last.ckpt"
    for name, path in (("best checkpoint", ending.best), ("last checkpoint", last)):
        if path is not None and path.exists():
            facts.append((name, shown(path)))
    files = [name for name in ("metrics.csv", "result.json", "pictures") if (run_dir / name).exists()]
    return [*facts, ("run directory", f"{shown(run_dir)} ({', '.join(files)})" if files else shown(run_dir))]


def next_commands(run_dir: Path, ending: Ending) -> list[tuple[str, list[str]]]:
    """What is usually typed after a run, each with what it is for; nothing that could not work."""
    last = run_dir / "checkpoints" / "last.ckpt"
    chosen = ending.best or last
    if not chosen.exists():
        return []
    run, checkpoint, predictions = shown(run_dir), shown(chosen), shown(run_dir / "predictions" / chosen.stem)
    found = []
    if last.exists() and ending.longer:
        found.append(("go on", command("resume", run, ending.longer)))
    if chosen.is_dir():
        # Of a run with parallel.fsdp=true.
        whole = shown(run_dir / "whole.ckpt")
        found.append(("make one file of the checkpoint", command("consolidate", checkpoint, whole)))
        checkpoint = whole
    found += [
        ("predict", command("predict", checkpoint, *ending.inputs, "--out", predictions)),
        ("evaluate", command("evaluate", predictions, *ending.inputs)),
    ]
    if other := _run_before(run_dir):
        found.append(("compare with the run before", command("compare", shown(other), run)))
    exported = shown(run_dir / "boltz.ckpt")
    return [*found, ("export for boltz predict", command("export-boltz", checkpoint, exported))]


def _run_before(run_dir: Path) -> Path | None:
    """The run that was started before this one: its neighbour in ``runs/DATE/TIME`` or in a folder of runs."""
    neighbours = [path.parent for path in run_dir.parent.glob("*/metrics.csv")]
    if not any(path != run_dir for path in neighbours) and run_dir.parent.parent.name == "runs":
        neighbours = [path.parent for path in run_dir.parent.parent.glob("*/*/metrics.csv")]
    earlier = [path for path in neighbours if path != run_dir]
    return max(earlier, key=lambda path: (path / "metrics.csv").stat().st_mtime, default=None)
