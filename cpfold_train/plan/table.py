"""Sizes of crops against numbers of GPUs: a table and a picture for the documentation, made by one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid, squarest
from cpfold_train.plan.compose import Request
from cpfold_train.plan.plan import GIB, Plan
from cpfold_train.plan.propose import LEAST_SIDE, first_that_fits
from cpfold_train.plan.report import levers

SIZES = (768, 1536, 3072, 6144, 12288, 32768)
RANKS = (1, 4, 16, 64, 256)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def write_table(request: Request, path: str) -> None:
    """Plan every size on every number of ranks up to ``gpus``, and put the table between the marks of a Markdown file
    and a picture of the same name beside it.

    Raises:
        ConfigError: the file has no marks.
    """
    target = Path(path)
    text = target.read_text() if target.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ConfigError(f"--table {path} needs a Markdown file with the lines {BEGIN} and {END}: add them to it")
    found: dict[tuple[int, int], Plan | None] = {}
    for size in SIZES:
        for ranks in (ranks for ranks in RANKS if ranks <= request.gpus):
            grid = Grid(*squarest(ranks))
            if size < LEAST_SIDE * grid.cols:
                continue
            config = replace(request.config, crop_size=size)
            found[size, ranks] = first_that_fits(config, grid, request.device)
            print(f"crop_size={size} on {ranks}: {_cell(found[size, ranks])}", flush=True)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    target.write_text(f"{before}{BEGIN}\n{_markdown(found)}\n{END}{after}")
    _draw(found, request.device, target.with_suffix(".png"))


def _cell(found: Plan | None) -> str:
    if found is None:
        return "-"
    return f"{found.costs.step_s:.3g} s, {found.peak / GIB:.0f} GiB, {' '.join(_short(found))}"


def _short(found: Plan) -> list[str]:
    memory = found.config.memory
    if not memory.recompute:
        return ["nothing recomputed"]
    return ["recomputed", *(text.removeprefix("memory.") for text in levers(memory) if text.startswith("memory."))]


def _markdown(found: dict[tuple[int, int], Plan | None]) -> str:
    ranks = sorted({ranks for _, ranks in found})
    lines = [
        "| tokens | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}, {Grid(*squarest(n))}" for n in ranks) + " |",
        "| --- |" + " --- |" * len(ranks),
    ]
    for size in sorted({size for size, _ in found}):
        cells = (_cell(found[size, n]) if (size, n) in found else "" for n in ranks)
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(found: dict[tuple[int, int], Plan | None], device: str, path: Path) -> None:
    """Peak memory and time of a step against the number of GPUs, a line a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, time) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for size in sorted({size for size, _ in found}):
        some = [(ranks, p) for (n, ranks), p in found.items() if n == size and p]
        if some:
            ranks, plans = zip(*some)
            memory.plot(ranks, [p.peak / GIB for p in plans], "o-", label=f"{size:,} tokens")
            time.plot(ranks, [p.costs.step_s for p in plans], "o-", label=f"{size:,} tokens")
    if shown := next((p for p in found.values() if p), None):
        memory.axhline(shown.memory / GIB, color="grey", linestyle=":")
        memory.annotate(device, (1, shown.memory / GIB), va="bottom")
    for axes, name in ((memory, "peak memory of a rank, GiB"), (time, "time of a step, s (estimated)")):
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=name)
        axes.set_xticks(RANKS, [str(n) for n in RANKS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
