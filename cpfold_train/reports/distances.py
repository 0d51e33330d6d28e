"""A map of predicted distances beside the true one, with the tiles drawn in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw_distances(
    path: Path,
    predicted: np.ndarray,
    centre: np.ndarray,
    known: np.ndarray,
    tokens: tuple[np.ndarray, np.ndarray],
    cuts: tuple[np.ndarray, np.ndarray],
    title: str,
) -> None:
    """Predicted and true maps side by side, white lines where tiles meet, unknown tokens left blank.

    Args:
        path: of the picture.
        predicted: (rows, cols) in Angstrom.
        centre: (N, 3) representative atoms in Angstrom.
        known: (N,) bool.
        tokens: of the rows, and of the columns.
        cuts: the tokens at which tiles begin, along the rows and along the columns.
        title: over the picture.
    """
    true = np.linalg.norm(centre[tokens[0], None] - centre[None, tokens[1]], axis=-1)
    blank = ~(known[tokens[0], None] & known[None, tokens[1]])
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    extent = (-0.5, len(centre) - 0.5, len(centre) - 0.5, -0.5)
    for axis, name, values in zip(axes, ("predicted", "true"), (predicted, true)):
        shown = np.ma.masked_where(blank, values)
        image = axis.imshow(shown, cmap="viridis_r", vmin=2, vmax=22, extent=extent, interpolation="nearest")
        for position in cuts[0][1:]:
            axis.axhline(position - 0.5, color="white", linewidth=1)
        for position in cuts[1][1:]:
            axis.axvline(position - 0.5, color="white", linewidth=1)
        axis.set(title=f"{name} distance", xlabel="token", ylabel="token")
    figure.colorbar(image, ax=axes, label="Å")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
