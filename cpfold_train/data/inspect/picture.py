"""The picture of a sample: its chains, its distances, its alignments, and the tokens that crops take of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.stream.crop import crop_tokens
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.random import numpy_generator
from cpfold_train.vocabulary import GAP

_MAX_SIDE = 768
"""Most rows of the drawn distance map; larger samples are drawn with a stride."""

_SHORT_SCALE = 40.0
"""Angstrom at the dark end of the distance map of small complexes."""

_MAX_NAMES = 24
_WINDOW = 9
"""Residues over which the identity is averaged."""

_LIGAND = to_rgb("0.25")


def draw_sample(path: Path, structure: Structure, alignments: dict[int, Alignment], crops: list[int]) -> None:
    """Draw one sample.

    Args:
        path: of the PNG.
        alignments: by entity.
        crops: sizes of crops in tokens.
    """
    colours = _colours(structure)
    figure = Figure(figsize=(14, 10), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(6, 2 if alignments else 0.4, 0.5 + 0.25 * len(crops)))
    _draw_chains(figure.add_subplot(grid[0, 0]), structure, colours)
    _draw_distances(figure.add_subplot(grid[0, 1]), structure, figure)
    coverage = figure.add_subplot(grid[1, :])
    _draw_alignments(coverage, structure, alignments, colours)
    _draw_crops(figure.add_subplot(grid[2, :], sharex=coverage), structure, crops, colours)
    counts = structure.meta["counts"]
    figure.suptitle(
        f"{structure.meta['id']}: {counts['tokens']:,} tokens, {counts['residues']:,} residues in {counts['chains']} "
        f"chains, {counts['ligands']} ligands, {counts['resolved']:,} tokens resolved"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _colours(structure: Structure) -> np.ndarray:
    """(chains, 3) a colour for each polymer chain, grey for ligands."""
    polymers = [chain["type"] != "nonpolymer" for chain in structure.meta["chains"]]
    palette = colormaps["tab10" if sum(polymers) <= 10 else "tab20"].colors
    numbers = np.cumsum(polymers) - 1
    return np.array([palette[n % len(palette)] if drawn else _LIGAND for n, drawn in zip(numbers, polymers)])


def _draw_chains(axis: Axes, structure: Structure, colours: np.ndarray) -> None:
    """Traces through the center atoms, seen along the direction in which the complex is thinnest."""
    center, known = structure.center
    if not known.any():
        axis.set_axis_off()
        return
    centred = center - center[known].mean(axis=0)
    flat = centred @ np.linalg.svd(centred[known], full_matrices=False)[2][:2].T
    flat[~known] = np.nan
    for asym_id, chain in enumerate(structure.meta["chains"]):
        points = flat[structure.asym_id == asym_id]
        if chain["type"] == "nonpolymer":
            axis.plot(*points.T, ".", color=colours[asym_id], markersize=2.5, alpha=0.7, zorder=3)
            continue
        axis.plot(*points.T, color=colours[asym_id], linewidth=1.1, alpha=0.85)
        if structure.meta["counts"]["chains"] <= _MAX_NAMES and not np.isnan(points).all():
            middle = np.nanmean(points, axis=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colours[asym_id], "alpha": 0.85}
            axis.text(*middle, chain["name"], fontsize=8, ha="center", va="center", bbox=box, zorder=4)
    axis.set(aspect="equal", xlabel="Å", ylabel="Å", title="chains (ligand atoms grey)")


def _draw_distances(axis: Axes, structure: Structure, figure: Figure) -> None:
    center, known = structure.center
    tokens = np.arange(0, len(structure), -(-len(structure) // _MAX_SIDE))
    distance = np.linalg.norm(center[tokens, None] - center[None, tokens], axis=-1)
    shown = np.ma.masked_where(~(known[tokens, None] & known[None, tokens]), distance)
    # Half of the distances are told apart, and contacts always.
    longest = max(_SHORT_SCALE, float(np.median(shown.compressed()))) if shown.count() else _SHORT_SCALE
    end = len(structure) - 0.5
    image = axis.imshow(
        shown, cmap="viridis_r", vmin=0, vmax=longest, extent=(-0.5, end, end, -0.5), interpolation="nearest"
    )
    for border in _borders(structure):
        axis.axhline(border, color="white", linewidth=0.5)
        axis.axvline(border, color="white", linewidth=0.5)
    axis.set_facecolor("0.75")
    axis.set(xlabel="token", ylabel="token", title="distances of center atoms (unresolved grey, lines between chains)")
    figure.colorbar(image, ax=axis, label="Å", extend="max", shrink=0.9)


def _borders(structure: Structure) -> np.ndarray:
    """Where polymer chains, and the ligands after them, begin."""
    owner = np.where(structure.polymer, structure.asym_id, -1)
    return np.flatnonzero(np.diff(owner)) + 0.5


def _draw_alignments(axis: Axes, structure: Structure, alignments: dict[int, Alignment], colours: np.ndarray) -> None:
    """Rows that have a residue at each position, and how many of these residues are the query's."""
    rows = np.full(len(structure), np.nan)
    identity = np.full(len(structure), np.nan)
    for asym_id, chain in enumerate(structure.meta["chains"]):
        if chain["entity"] not in alignments:
            continue
        tokens = np.flatnonzero(structure.asym_id == asym_id)
        aligned = alignments[chain["entity"]].tokens[1:]
        there = aligned != GAP
        rows[tokens] = there.sum(axis=0)
        same = (aligned == alignments[chain["entity"]].tokens[0]) & there
        window = np.ones(min(_WINDOW, len(tokens)))
        smooth = [np.convolve(counts.sum(axis=0), window, mode="same") for counts in (same, there)]
        identity[tokens] = 100 * smooth[0] / np.maximum(smooth[1], 1)
        axis.fill_between(tokens, rows[tokens], step="mid", color=colours[asym_id], alpha=0.6, linewidth=0)
    axis.set(xlim=(-0.5, len(structure) - 0.5), ylim=(0, None), title="alignments")
    if np.isnan(rows).all():
        axis.text(0.5, 0.5, "no alignment", transform=axis.transAxes, ha="center", va="center", color="0.4")
        axis.set_yticks([])
        return
    axis.set_ylabel("rows with a residue")
    right = axis.twinx()
    right.plot(identity, color="black", linewidth=0.7)
    right.set(ylim=(0, 100), ylabel=f"% identical over {_WINDOW} (line)")


def _draw_crops(axis: Axes, structure: Structure, crops: list[int], colours: np.ndarray) -> None:
    """A strip of all tokens in their chains' colours, and one of the tokens of each crop."""
    strips = np.ones((len(crops) + 1, len(structure), 3))
    strips[0] = colours[structure.asym_id]
    labels = ["all tokens"]
    for row, size in enumerate(crops, 1):
        tokens = crop_tokens(structure, numpy_generator(0, "inspect", size), max_tokens=size)
        strips[row, tokens] = colours[structure.asym_id[tokens]]
        labels.append(f"crop of {len(tokens):,}")
    height = len(strips) - 0.5
    axis.imshow(strips, aspect="auto", interpolation="nearest", extent=(-0.5, len(structure) - 0.5, height, -0.5))
    for border in range(len(crops)):
        axis.axhline(border + 0.5, color="white", linewidth=2)
    axis.set_yticks(range(len(strips)), labels)
    axis.set_xlabel("token")
