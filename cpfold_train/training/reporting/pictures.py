"""When pictures of a run are drawn, and what of the distogram they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.gather import gather_tensor
from cpfold_train.reports.curves import draw_curves
from cpfold_train.reports.distances import draw_distances
from cpfold_train.training.validation_metrics import read_distogram

MAX_SIDE = 512
"""Most rows and columns of a drawn map; larger samples are drawn with a stride."""


class Pictures(Callback):
    """Draws the first sample of each validation and, at the end, the curves.

    Args:
        run_dir: holds ``metrics.csv``; the pictures go to ``pictures``.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, DTensor],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx:
            return
        predicted, tokens, cuts = predicted_map(outputs["pdistogram"], trainer.strategy.cp)
        if not trainer.is_global_zero:
            return
        centre = batch["disto_center"].to_local()[0].cpu().double().numpy()
        known = batch["token_disto_mask"].to_local()[0].cpu().numpy().astype(bool)
        path = self._run_dir / "pictures" / f"distances_step{trainer.global_step:06d}.png"
        title = f"{batch['id'][0]}, {int(batch['num_tokens'][0])} tokens, step {trainer.global_step}"
        draw_distances(path, predicted, centre, known, tokens, cuts, title)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/distances", [str(path)], step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            draw_curves(self._run_dir / "metrics.csv", self._run_dir / "pictures" / "loss.png")


def predicted_map(
    pdistogram: DTensor, cp: ContextParallel
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Expected distances of the first sample, at most about ``MAX_SIDE`` x ``MAX_SIDE``, on every rank.

    Each rank strides over its own tile, so only what is drawn is read and sent.

    Args:
        pdistogram: (B, N, N, 1, bins), tiled.

    Returns:
        (rows, cols) expected distance in Angstrom; the token of each row and of each column; the tokens at which the
        rows' and the columns' tiles begin.
    """
    n, grid = pdistogram.shape[1], cp.grid
    stride = -(-n // MAX_SIDE)
    tile = pdistogram.to_local()[0, ::stride, ::stride, 0]
    expected, _ = read_distogram(tile)
    tiles = gather_tensor(expected, cp.all).cpu().numpy()
    rows, cols = expected.shape
    whole = tiles.reshape(grid.rows, grid.cols, rows, cols).swapaxes(1, 2).reshape(grid.rows * rows, grid.cols * cols)
    cuts = np.arange(0, n, n // grid.rows), np.arange(0, n, n // grid.cols)
    tokens = tuple((starts[:, None] + stride * np.arange(side)).ravel() for starts, side in zip(cuts, (rows, cols)))
    return whole, tokens, cuts
