"""``python -m cpfold_train gpu-check``: prove this machine's GPUs right, and measure what they reach."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from cpfold_train.devices import Rates
from cpfold_train.errors import ConfigError, RunError
from cpfold_train.gpu_check.apart import run_apart
from cpfold_train.gpu_check.phases import PHASES, Results
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.report import as_markdown, show, told_shortly
from cpfold_train.gpu_check.scope import ON_CPU, ON_GPU, Scope
from cpfold_train.whole_file import whole_file

RATES = tuple(field.name for field in fields(Rates))
"""Those that a plan takes."""
RESULTS, TABLE = "gpu-check.json", "gpu-check.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--minutes", type=float, default=10, help="time for all phases together (default: 10)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        metavar="DIR",
        help=f"receives {RESULTS}, {TABLE} and what each phase printed (default: gpu-check)",
    )
    parser.add_argument("--only", metavar="PHASE,...", help="of " + ", ".join(PHASES))
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs the same phases small (default: cuda)"
    )


def run(args: argparse.Namespace) -> None:
    """Run the phases one after the other, and write the results after each.

    Raises:
        ConfigError: for options that cannot work, or where there is no GPU.
        RunError: a phase failed.
    """
    chosen = _chosen(args.only)
    if args.minutes <= 0:
        raise ConfigError(f"--minutes {args.minutes:g} leaves no time: type --minutes 10")
    scope = ON_GPU if args.device == "cuda" else ON_CPU
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    results: Results = {"device": {}, "rates": {}, "phases": {}}
    console = Console()
    for i, name in enumerate(chosen):
        left = sum(PHASES[other].share for other in chosen[i:])
        limit_s = max(1.0, (deadline - time.monotonic()) * PHASES[name].share / left)
        _run_phase(name, scope, results, args.out, limit_s)
        with whole_file(args.out / RESULTS) as text:
            json.dump(results, text, indent=1)
        with whole_file(args.out / TABLE) as text:
            text.write(as_markdown(results))
        found = results["phases"][name]
        console.print(f"{name}: {found['status']} in {found['seconds']:.1f} s{told_shortly(name, found)}")
        if name == "machine" and found["failures"]:
            raise ConfigError(found["failures"][0].partition(": ")[2])
    show(results, console)
    failed = [name for name, found in results["phases"].items() if found["status"] == "failed"]
    if failed:
        raise RunError(f"gpu-check failed in {', '.join(failed)}: {args.out / RESULTS} says where")


def _chosen(only: str | None) -> list[str]:
    """The phases to run. What the machine is and what it reaches, others need to know."""
    if only is None:
        return list(PHASES)
    asked = only.split(",")
    unknown = next((name for name in asked if name not in PHASES), None)
    if unknown is not None:
        raise ConfigError(f"--only {unknown} is no phase: type --only " + " or --only ".join(PHASES))
    return [name for name in PHASES if name in asked or name == "machine"]


def _run_phase(name: str, scope: Scope, results: Results, out: Path, limit_s: float) -> None:
    """Run one phase in a process of its own, and add what it has found to the results."""
    file, started = out / f"{name}.json", time.monotonic()
    file.unlink(missing_ok=True)

    def work(record: Record) -> None:
        PHASES[name].run(record, scope, results)

    with Console(stderr=True).status(name) as status:

        def watch() -> None:
            seconds = time.monotonic() - started
            status.update(f"{name}: {_read(file)['doing']}, {seconds:.0f} of at most {limit_s:.0f} s")

        fault = run_apart(work, file, out / f"{name}.log", limit_s, watch)
    found = _read(file)
    file.unlink(missing_ok=True)
    if fault:
        found["failures"].append(f"{found['doing'] or 'phase'}: {fault}")
    del found["doing"]
    found["status"] = "failed" if found["failures"] else "passed"
    results["phases"][name] = {"seconds": time.monotonic() - started, "limit_s": limit_s, **found}
    if name == "machine":
        results["device"] = found["entries"].get("device", {})
    if name == "rates":
        results["rates"] = {rate: found["entries"][rate]["rate"] for rate in RATES if rate in found["entries"]}


def _read(file: Path) -> Results:
    if not file.exists():
        return {"entries": {}, "failures": [], "left_out": [], "doing": ""}
    return json.loads(file.read_text())
