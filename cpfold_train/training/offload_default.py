"""``memory.offload`` where a run leaves it open: whether what lies between blocks goes to the host."""

from __future__ import annotations

from dataclasses import replace

from cpfold_train.parallel.grid import Grid
from cpfold_train.training.config import TrainConfig

LARGEST_PART = 1 / 3
"""Of the device's memory that tiles between blocks may take: weights, the blocks at work and losses need the rest."""


def with_default_offload(config: TrainConfig, grid: Grid, device_bytes: float | None) -> TrainConfig:
    """The configuration with ``memory.offload`` decided, by the size of the tiles of z between recomputed blocks.

    On a GPU the way to the host and back runs beside the computation, so it costs no arithmetic, where grouping blocks
    costs another forward pass. Only the size of the largest crop decides: the same on every rank, and without a trace.

    Args:
        config: of the run; what it says of ``memory.offload`` holds.
        grid: the ranks.
        device_bytes: memory of a rank's GPU; None on CPU, where the tiles are on the host already.
    """
    memory = config.memory
    if memory.offload is not None or device_bytes is None:
        return config
    open_ended = memory.recompute and not memory.auto
    too_many = between_blocks_bytes(config, grid) > LARGEST_PART * device_bytes
    return replace(config, memory=replace(memory, offload=open_ended and too_many))


def between_blocks_bytes(config: TrainConfig, grid: Grid) -> float:
    """Bytes of the tiles of z that a rank keeps between groups of blocks until the backward pass comes to them."""
    model = config.model
    tile = tile_elements(config, grid, config.largest_crop) * (
        2 if config.memory.residual == "bf16" else z_width(config)
    )
    blocks = model.pairformer.num_blocks + model.msa.msa_blocks
    if config.loss.of_confidence:
        blocks += config.diffusion.samples * model.confidence.pairformer.num_blocks
    return tile * blocks / config.memory.blocks_at_once


def tile_elements(config: TrainConfig, grid: Grid, crop_size: int) -> int:
    """Elements of a rank's tile of z, of a batch of samples with so many tokens."""
    n = grid.pad_tokens(crop_size)
    return config.batch_size * (n // grid.rows) * (n // grid.cols) * config.model.token_z


def z_width(config: TrainConfig) -> int:
    """Bytes of an element of z within blocks."""
    return {"64-true": 8, "bf16-true": 2}.get(str(config.trainer.precision), 4)
