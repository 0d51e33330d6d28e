"""The data side of Lightning: loaders of tiles, and batches as dicts of DTensors."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from cpfold_train.data.batch import PLACEMENTS, Augmentation
from cpfold_train.data.loader import TileLoader
from cpfold_train.training.config import DataConfig

_PLAIN = ("sample_key", "num_tokens")
"""Figures of a sample, not features of the model: they stay plain tensors."""


class TileData(LightningDataModule):
    """Loaders for this rank's place in the grid; each rank builds only its own tiles.

    Args:
        data: what to read and how.
        crop_size: most tokens of a sample.
        batch_size: samples a step and replica.
        seed: of order, crops and MSA rows.
    """

    def __init__(self, data: DataConfig, crop_size: int, batch_size: int, seed: int) -> None:
        super().__init__()
        self._data = data
        self._common = {"crop_size": crop_size, "batch_size": batch_size, "seed": seed}

    def train_dataloader(self) -> TileLoader:
        return self._loader(
            self._data.train,
            shuffle=True,
            samples_per_epoch=self._data.samples_per_epoch,
            augmentation=Augmentation(**vars(self._data.augmentation)),
        )

    def val_dataloader(self) -> TileLoader | list:
        return self._loader(self._data.val, shuffle=False) if self._data.val else []

    def _loader(self, shards: list[str], **settings: Any) -> TileLoader:
        strategy = self.trainer.strategy
        return TileLoader(
            shards,
            strategy.cp.grid,
            crop=self._data.crop,
            interface=self._data.interface,
            max_msa_rows=self._data.max_msa_rows,
            max_templates=self._data.max_templates,
            num_workers=self._data.num_workers,
            pin_memory=strategy.root_device.type == "cuda",
            **self._common,
            **settings,
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Name what each rank holds: all features become DTensors, without communication."""
        cp = self.trainer.strategy.cp
        wrap = {"tile": cp.tiled, "replicate": cp.replicated, "atoms": cp.shared_out}
        return {
            name: value if name in _PLAIN or name not in PLACEMENTS else wrap[PLACEMENTS[name]](value)
            for name, value in batch.items()
        }
