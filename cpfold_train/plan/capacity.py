"""What fits where: a table of crop sizes and numbers of GPUs with the memory options that each needs, and its plot."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import Progress

from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.plan import Plan
from cpfold_train.plan.propose import first_that_fits, grids, memory_presets
from cpfold_train.plan.report import typed_options
from cpfold_train.whole_file import whole_file

FORMAT = 2
"""Of the file of cells."""
CROPS = (768, 1536, 3072, 6144, 12288, 24576, 32768)
Cell = dict[str, int | float | str | None]
"""``crop_size``, ``gpus``, ``grid``; and where something fits ``preset`` (its index in :func:`memory_presets`),
``memory`` (what to type), ``peak_gib``, ``sent_mib`` and ``step_s``, which are None elsewhere."""


def capacity(config: TrainConfig, device: str, gpus: int, file: Path) -> list[Cell]:
    """Plan each crop size on 1, 4, 16 ... GPUs up to ``gpus``, with the cheapest memory options that fit.

    Small tiles come first: a larger one is taken to need no cheaper memory options, and not to fit where one did not.

    Args:
        config: of the run; its crop size, grid, replicas and memory options are not regarded.
        file: JSON of the cells, which grows with each; what is in it is not planned again.

    Raises:
        ConfigError: there is no such device, or the file holds plans of another run.
    """
    one_run = replace(config, crop_size=CROPS[0], dp=1, memory=MemoryConfig(), cp=replace(config.cp, grid="1x1"))
    # As it is read back: keys of a mapping are strings there.
    planned = json.loads(json.dumps({"format": FORMAT, "device": device, "run": asdict(one_run)}))
    kept = json.loads(file.read_text()) if file.exists() else planned | {"cells": []}
    if planned != {key: kept.get(key) for key in planned}:
        raise ConfigError(f"{file} holds plans of another run or device: type another --table FILE, or remove it")
    known = {(cell["crop_size"], cell["gpus"]): cell for cell in kept["cells"]}
    presets = memory_presets(config, device)
    cells = [(crop, grid) for crop in CROPS for grid in grids(crop, gpus, factor=4)]
    first = 0
    with Progress(console=Console(stderr=True)) as progress:
        by_tile = sorted(cells, key=lambda cell: cell[0] ** 2 / cell[1].world_size)
        for crop, grid in progress.track(by_tile, description="planning"):
            key = crop, grid.world_size
            if key not in known:
                found = first_that_fits(replace(config, crop_size=crop), grid, device, presets[first:])
                known[key] = _cell(crop, grid, found, presets)
                with whole_file(file) as text:
                    json.dump(planned | {"cells": list(known.values())}, text, indent=1)
            preset = known[key]["preset"]
            first = len(presets) if preset is None else max(first, preset)
    return [known[crop, grid.world_size] for crop, grid in cells]


def _cell(crop: int, grid: Grid, found: Plan | None, presets: list) -> Cell:
    cell: Cell = {"crop_size": crop, "gpus": grid.world_size, "grid": str(grid)}
    if found is None:
        return cell | dict.fromkeys(("preset", "memory", "peak_gib", "sent_mib", "step_s"))
    planned = found.as_dict()
    return cell | {
        "preset": presets.index(found.config.memory),
        "memory": " ".join(typed_options(found.config.memory)),
        "peak_gib": planned["peak_memory_gib"],
        "sent_mib": planned["sent_mib_per_step"],
        "step_s": planned["step_s_estimate"],
    }


def as_markdown(cells: list[Cell]) -> str:
    """A row a crop size, a column a number of GPUs: peak of a rank, step time and the number of its preset."""
    crops, counts = ({cell[key]: None for cell in cells} for key in ("crop_size", "gpus"))
    by_key = {(cell["crop_size"], cell["gpus"]): cell for cell in cells}
    titles = " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts)
    lines = [f"| crop | {titles} |", "| --- " * (len(counts) + 1) + "|"]
    for crop in crops:
        texts = (_in_words(by_key.get((crop, n))) for n in counts)
        lines.append(f"| {crop:,} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _in_words(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell["preset"] is None:
        return "-"
    return f"{cell['peak_gib']:.0f} GiB, {cell['step_s']:.3g} s ({cell['preset']})"


def draw(cells: list[Cell], title: str, file: Path) -> None:
    """Time of a step against the number of GPUs, a line a crop size; the larger a point, the fuller the memory."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for crop in {cell["crop_size"]: None for cell in cells}:
        fits = [cell for cell in cells if cell["crop_size"] == crop and cell["preset"] is not None]
        if fits:
            x, y = [cell["gpus"] for cell in fits], [cell["step_s"] for cell in fits]
            (line,) = axes.plot(x, y, label=f"{crop:,}")
            axes.scatter(x, y, [2 * cell["peak_gib"] for cell in fits], color=line.get_color())
            for cell in fits:
                where = (cell["gpus"], cell["step_s"])
                axes.annotate(str(cell["preset"]), where, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds a step (estimated)", title=title)
    ticks = sorted({cell["gpus"] for cell in cells})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(title="crop_size", fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=110)
    plt.close(figure)
