"""The data side of Lightning: loaders of tiles, and batches as dicts of DTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from cpfold_train.config.schema import DataConfig
from cpfold_train.config.sources import training_sources, validation_source
from cpfold_train.data.schema import ATOMS, FEATURES, REPLICATED, TILE
from cpfold_train.data.stream.batch import Augmentation
from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.padding import GPU_MULTIPLE
from cpfold_train.data.stream.sampling import Source
from cpfold_train.training.same_samples import check_same_samples


class TileData(LightningDataModule):
    """Loaders for this rank's position in the grid; each rank builds only its own tiles.

    Args:
        data: what to read and how.
        crop_size: most tokens of a sample.
        batch_size: samples a step and replica.
        accumulate: batches of an optimizer step.
        seed: of order, crops and MSA rows.
        quarantine: file that receives the samples which cannot be used.
    """

    def __init__(
        self, data: DataConfig, crop_size: int, batch_size: int, accumulate: int, seed: int, quarantine: Path
    ) -> None:
        super().__init__()
        self._data, self._accumulate = data, accumulate
        self._common = {"crop_size": crop_size, "batch_size": batch_size, "seed": seed, "quarantine": quarantine}
        self._loaders: list[TileLoader] = []

    @property
    def quarantined(self) -> int:
        """Samples that this replica could not use since the start, in training and validation."""
        return sum(loader.quarantined for loader in self._loaders)

    def train_dataloader(self) -> TileLoader:
        return self._loader(
            training_sources(self._data),
            shuffle=True,
            samples_per_epoch=self._data.samples_per_epoch,
            crop_schedule=self._data.crop_schedule,
            limit=self.trainer.limit_train_batches,
            accumulate=self._accumulate,
            augmentation=Augmentation(random_rows=True, **vars(self._data.augmentation)),
        )

    def val_dataloader(self) -> TileLoader | list:
        return self._loader([validation_source(self._data)], shuffle=False) if self._data.val else []

    def _loader(self, sources: list[Source], **settings: Any) -> TileLoader:
        strategy, on_gpu = self.trainer.strategy, self.trainer.strategy.root_device.type == "cuda"
        loader = TileLoader(
            sources,
            strategy.cp.grid,
            max_atoms=self._data.max_atoms,
            max_msa_rows=self._data.max_msa_rows,
            max_templates=self._data.max_templates,
            features=self._data.features,
            max_bad_share=self._data.max_bad_share,
            num_workers=self._data.num_workers,
            side=GPU_MULTIPLE if on_gpu else 1,
            buckets=self._data.buckets,
            pin_memory=on_gpu,
            **self._common,
            **settings,
        )
        self._loaders.append(loader)
        return loader

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Make sure that all ranks of the replica have come to the same samples."""
        check_same_samples(batch, self.trainer.strategy.cp)
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Say what each rank holds: features become DTensors by their placements, without communication."""
        cp = self.trainer.strategy.cp
        wrap = {TILE: cp.tiled, REPLICATED: cp.replicated, ATOMS: cp.sharded}
        wraps = {name: wrap[feature.placement] for name, feature in FEATURES.items() if feature.placement in wrap}
        return {name: wraps[name](value) if name in wraps else value for name, value in batch.items()}
