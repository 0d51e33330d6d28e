"""Results on the terminal and as Markdown for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from cpfold_train.gpu_check.phases import PHASES, Results

Found = dict[str, Any]
LEFT_OUT = 6
"""Names that are told of what was left out."""


def told_shortly(name: str, found: Found) -> str:
    """The end of a phase's line."""
    if found["failures"]:
        return f": {found['failures'][0]}"
    entries = found["entries"]
    if name in ("parity", "ranks"):
        errors = [entry["error"] for entry in entries.values() if "error" in entry]
        return f": {len(errors)} cases, worst error {max(errors, default=0):.1e}"
    if name == "step" and "measured" in entries:
        return f": {entries['planned']['crop_size']} tokens in {entries['measured']['step_s']:.3g} s"
    if name == "largest" and "largest" in entries:
        return f": {entries['largest']['crop_size']} tokens"
    return ""


def show(results: Results, console: Console) -> None:
    """A row a phase, and all that failed."""
    table = Table("phase", "shows", "status", "s", title=f"gpu-check on {results['device'].get('name', 'no device')}")
    for name, found in results["phases"].items():
        table.add_row(name, PHASES[name].title, found["status"], f"{found['seconds']:.1f}")
    console.print(table)
    for name, found in results["phases"].items():
        for failure in found["failures"]:
            console.print(f"{name}: {failure}", soft_wrap=True)
        if found["left_out"]:
            told = ", ".join(found["left_out"][:LEFT_OUT]) + (" ..." if len(found["left_out"]) > LEFT_OUT else "")
            console.print(f"{name}: no time was left for {told}", soft_wrap=True)


def as_markdown(results: Results) -> str:
    """The tables of one card."""
    phases = results["phases"]
    return "\n".join(
        line
        for name, section in SECTIONS.items()
        if name in phases
        for line in (*section(phases[name]["entries"]), *_failed(phases[name]), "")
    )


def _failed(found: Found) -> list[str]:
    return ["", *(f"- failed: {failure}" for failure in found["failures"])] if found["failures"] else []


def _table(head: str, rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    columns = head.split(", ")
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _machine(entries: Found) -> list[str]:
    device, packages = entries.get("device", {}), entries.get("packages", {})
    lines = [f"### {device.get('name', 'no device')}", ""]
    if "memory_bytes" in device:
        capability = ".".join(map(str, device["capability"]))
        gib = device["memory_bytes"] / 2**30
        lines.append(f"{device['count']} of {gib:.0f} GiB, compute capability {capability}; ")
    lines[-1] += f"torch {entries.get('host', {}).get('torch')}, " + ", ".join(
        f"{name} {found}" for name, found in packages.items()
    )
    if choice := entries.get("kernels=auto"):
        lines.append(f"`kernels=auto` is {choice['chosen']}, because {choice['because']}.")
    return lines


def _errors(title: str) -> Any:
    def section(entries: Found) -> list[str]:
        cases = {name: entry for name, entry in entries.items() if "error" in entry}
        lines = [f"{title}: {len(cases)} cases."]
        lines += [
            f"{name} ({entry['grid']}) did not work: {entry['fault']}"
            if entry["fault"]
            else f"By {name}, {entry['grid']}."
            for name, entry in entries.items()
            if "fault" in entry
        ]
        rows = [[name, f"{entry['error']:.1e}", entry["worst"]] for name, entry in cases.items()]
        return [*lines, "", *_table("case, largest relative error, of its", rows)]

    return section


def _draws(entries: Found) -> list[str]:
    rows = [[name, f"{entry['differ']:,} of {entry['of']:,}"] for name, entry in entries.items()]
    return ["Draws that differ from the CPU's:", "", *_table("draws, differ", rows)]


def _precision(entries: Found) -> list[str]:
    rows = [[name, f"{max(entry.values()):.1e}", max(entry, key=entry.get)] for name, entry in entries.items()]
    return [
        "Against fp64:",
        "",
        *_table("block and precision and kernels, largest relative error, of".replace(" and ", " / "), rows),
    ]


def _rates(entries: Found) -> list[str]:
    return [
        "What the card reaches:",
        "",
        *_table("rate, a second", [[n, _rate(n, e["rate"])] for n, e in entries.items()]),
    ]


def _rate(name: str, rate: float) -> str:
    if name == "launch_s":
        return f"{rate * 1e6:.1f} microseconds each"
    scale, unit = next((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (0, "")) if rate >= s)
    kind = "B" if "bytes" in name else "exp" if name == "exp_s" else "FLOP"
    return f"{rate / (scale or 1):.3g} {unit}{kind}/s"


def _blocks(entries: Found) -> list[str]:
    timed = {name: entry for name, entry in entries.items() if "trained_ms" in entry}
    lines = ["As one rank of 2x2, without what is sent:", ""]
    head = (
        "block or op, forward ms, floor, with recomputation and backward ms, floor, times the floor, peak MiB, launches"
    )
    lines += _table(head, [[name, *_of_block(entry)] for name, entry in timed.items()])
    for name, entry in timed.items():
        if "kernels" in entry:
            rows = [[one["name"], str(one["count"]), f"{one['ms']:.2f}"] for one in entry["kernels"]]
            lines += ["", f"{name}, by kernel:", "", *_table("kernel, launches, ms", rows)]
    return lines


def _of_block(entry: Found) -> list[str]:
    def figure(key: str, digits: int) -> str:
        return f"{entry[key]:.{digits}f}" if key in entry else "-"

    times = f"{entry['trained_ms'] / entry['trained_floor_ms']:.1f}" if "trained_floor_ms" in entry else "-"
    times_ms = figure("forward_ms", 2), figure("floor_ms", 2), figure("trained_ms", 2), figure("trained_floor_ms", 2)
    return [*times_ms, times, figure("peak_mib", 0), figure("launches", 0)]


def _cores(entries: Found) -> list[str]:
    rows = [
        [
            name,
            f"{entry['forward_ms']:.2f}",
            f"{entry['backward_ms']:.2f}",
            f"{entry['forward_flops'] / 1e12:.1f}",
            f"{entry['backward_flops'] / 1e12:.1f}",
        ]
        for name, entry in entries.items()
    ]
    return [
        "Triangle attention alone:", "",
        *_table("kernels, forward ms, backward ms, forward TFLOP/s, backward TFLOP/s", rows)
    ]  # fmt: skip


def _step(entries: Found) -> list[str]:
    title = f"A training step of Boltz-2 with `crop_size={entries.get('planned', {}).get('crop_size', '?')}`:"
    return [title, "", *_steps("measurements", entries)]


def _largest(entries: Found) -> list[str]:
    tried = {name: entry for name, entry in entries.items() if name.startswith("crop_size=")}
    return ["The largest crop that runs, with all memory options:", "", *_steps("crop", tried)]


def _steps(first: str, entries: Found) -> list[str]:
    keys = ("tokens", "step_s", "tokens_a_second", "peak_gib")
    rows = [
        [
            name,
            *(f"{entry[key]:.4g}" if key in entry else "-" for key in keys),
            "no" if "out_of_memory" in entry else "yes",
        ]
        for name, entry in entries.items()
    ]
    return _table(f"{first}, tokens, s a step, tokens a second, peak GiB, fits", rows)


SECTIONS = {
    "machine": _machine,
    "parity": _errors("Against the CPU, in fp64"),
    "draws": _draws,
    "ranks": _errors("Several ranks against one, in fp64"),
    "precision": _precision,
    "rates": _rates,
    "blocks": _blocks,
    "cores": _cores,
    "step": _step,
    "largest": _largest,
}
