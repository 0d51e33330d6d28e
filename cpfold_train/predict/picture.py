"""A picture of a prediction: confidence along the chains, aligned error, and the structure, over the truth if known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import biotite.structure as struc
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cpfold_train.data.inputs.inputs import has_truth
from cpfold_train.data.stream.batch import Crop
from cpfold_train.data.structures.structure import Structure
from cpfold_train.evaluate.match import match
from cpfold_train.evaluate.superpose import superposition

MAX_SIDE = 1024
"""Most rows and columns of the drawn map; larger ones are drawn with a stride."""
_LEVELS = (50, 70, 90)
_MAX_ERROR = 31.75
"""Angstrom: the last bin of the aligned error."""


def draw_prediction(path: Path, crop: Crop, coords: np.ndarray, arrays: dict[str, np.ndarray], title: str) -> None:
    """Draw the best sample of a query.

    Args:
        coords: (A, 3) in Angstrom.
        arrays: ``plddt`` (n,) in 0-1 and ``pae`` (n, n) in Angstrom, where the model gives them.
        title: over the picture.
    """
    figure = Figure(figsize=(15, 8.5 if "plddt" in arrays else 5.5), layout="constrained")
    panels = figure.subplot_mosaic(_layout(arrays), height_ratios=[1, 3][-len(_layout(arrays)) :])
    if "plddt" in arrays:
        _draw_plddt(panels["plddt"], crop, arrays["plddt"])
    if "pae" in arrays:
        _draw_pae(panels["pae"], crop, arrays["pae"])
    shown, truth, caption = _traces(crop, coords)
    confidence = None
    if "plddt" in arrays and truth is None:
        confidence = np.zeros(len(crop.structure))
        confidence[crop.tokens] = 100 * arrays["plddt"]
    for name, second in (("front", 1), ("side", 2)):
        _draw_view(panels[name], crop.structure, shown, truth, confidence, second)
    figure.suptitle(title + caption)
    figure.savefig(path, dpi=100)


def _layout(arrays: dict[str, np.ndarray]) -> list[list[str]]:
    lower = [*(["pae"] if "pae" in arrays else []), "front", "side"]
    return [*([["plddt"] * len(lower)] if "plddt" in arrays else []), lower]


def _borders(crop: Crop) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Where chains begin, the ligands after each other as one, and the middle and the label of each."""
    structure = crop.structure
    owner = np.where(structure.polymer, structure.asym_id, -1)[crop.tokens]
    start = np.concatenate([[0], 1 + np.flatnonzero(np.diff(owner)), [len(owner)]])
    names = [chain["name"] for chain in structure.meta["chains"]]
    labels = [names[owner[i]] if owner[i] >= 0 else "ligands" for i in start[:-1]]
    return start, [((a + b - 1) / 2, label) for a, b, label in zip(start, start[1:], labels)]


def _draw_plddt(axis: Axes, crop: Crop, plddt: np.ndarray) -> None:
    start, labels = _borders(crop)
    for level in _LEVELS:
        axis.axhline(level, color="0.85", linewidth=1, zorder=0)
    for border in start[1:-1]:
        axis.axvline(border - 0.5, color="0.4", linewidth=0.8, linestyle="--")
    axis.plot(100 * plddt, color="tab:blue", linewidth=1)
    for middle, label in labels:
        axis.annotate(label, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    axis.set(xlim=(-0.5, len(plddt) - 0.5), ylim=(0, 100), xlabel="token", ylabel="pLDDT")


def _draw_pae(axis: Axes, crop: Crop, pae: np.ndarray) -> None:
    stride = -(-len(pae) // MAX_SIDE)
    extent = (-0.5, len(pae) - 0.5, len(pae) - 0.5, -0.5)
    image = axis.imshow(
        pae[::stride, ::stride], cmap="Greens_r", vmin=0, vmax=_MAX_ERROR, extent=extent, interpolation="nearest"
    )
    for border in _borders(crop)[0][1:-1]:
        axis.axvline(border - 0.5, color="black", linewidth=0.8)
        axis.axhline(border - 0.5, color="black", linewidth=0.8)
    axis.figure.colorbar(image, ax=axis, label="Å", shrink=0.8)
    axis.set(xlabel="scored token", ylabel="aligned token", title="predicted aligned error")


class _Trace(NamedTuple):
    """Center atoms (L, 3) of a structure's tokens in Angstrom, and (L,) bool which are there."""

    points: np.ndarray
    known: np.ndarray


def _traces(crop: Crop, coords: np.ndarray) -> tuple[_Trace, _Trace | None, str]:
    """The prediction, the truth under it where it is known, and what to say about how they lie."""
    predicted = predicted_structure(crop, coords)
    points, known = predicted.center
    if not has_truth(crop.structure):
        return _Trace(points, known), None, ""
    matched = match(crop.structure, predicted)
    moving, fixed = matched.predicted[matched.center], matched.truth[matched.center]
    onto_truth = superposition(moving, fixed)
    caption = f", RMSD {struc.rmsd(fixed, onto_truth.apply(moving)):.2f} Å to the truth (grey)"
    truth, resolved = crop.structure.center
    # What is outside the crop would hide it.
    return _Trace(onto_truth.apply(points), known), _Trace(truth, resolved & known), caption


def _draw_view(
    axis: Axes, structure: Structure, shown: _Trace, truth: _Trace | None, confidence: np.ndarray | None, second: int
) -> None:
    """The longest axis of the structure to the right, its second or third one upwards.

    Args:
        confidence: (L,) pLDDT in percent, which colours the trace; None colours it by chain.
    """
    extent = shown if truth is None else truth
    middle = extent.points[extent.known].mean(axis=0)
    plane = np.linalg.svd(extent.points[extent.known] - middle, full_matrices=False)[2][[0, second]].T
    ligand = ~structure.polymer
    if truth is not None:
        lines, _ = _segments(structure, truth, middle, plane)
        axis.add_collection(LineCollection(lines, colors="0.75", linewidths=4.5, capstyle="round"))
        axis.scatter(*((truth.points[truth.known & ligand] - middle) @ plane).T, s=30, color="0.75", linewidths=0)
    lines, first = _segments(structure, shown, middle, plane)
    own = np.flatnonzero(shown.known & ligand)
    dots = ((shown.points[own] - middle) @ plane).T
    if confidence is None:
        palette = colormaps["tab10"]
        axis.add_collection(LineCollection(lines, colors=palette(structure.asym_id[first] % 10), linewidths=1.4))
        axis.scatter(*dots, s=7, color=palette(structure.asym_id[own] % 10), zorder=3)
    else:
        style = {"cmap": "RdYlBu", "norm": Normalize(30, 100)}
        trace = axis.add_collection(LineCollection(lines, array=confidence[first], linewidths=1.8, **style))
        axis.scatter(*dots, s=7, c=confidence[own], zorder=3, **style)
        axis.figure.colorbar(trace, ax=axis, label="pLDDT", shrink=0.8)
    axis.autoscale()
    axis.set(aspect="equal", xlabel="Å", title="structure" if second == 1 else "turned by 90 degrees")


def _segments(
    structure: Structure, trace: _Trace, middle: np.ndarray, plane: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(k, 2, 2) lines between neighbours in sequence, and the token at which each begins."""
    joined = trace.known[:-1] & trace.known[1:] & structure.polymer[:-1]
    joined &= (np.diff(structure.asym_id) == 0) & (np.diff(structure.res_index) == 1)
    first = np.flatnonzero(joined)
    flat = (trace.points - middle) @ plane
    return np.stack([flat[first], flat[first + 1]], axis=1), first


def predicted_structure(crop: Crop, coords: np.ndarray) -> Structure:
    """The structure with predicted coordinates (A, 3), in which just the crop's atoms are resolved."""
    structure = crop.structure
    whole, resolved = np.zeros_like(structure.coords), np.zeros_like(structure.resolved)
    whole[crop.atoms.atom], resolved[crop.atoms.atom] = coords, True
    return replace(structure, coords=whole, resolved=resolved)
