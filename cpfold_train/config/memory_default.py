"""``memory.offload`` and ``memory.keep_attention`` where a run leaves them open: what is kept for the backward pass,
and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from cpfold_train.config.schema import TrainConfig
from cpfold_train.devices import find_device, kernels_on
from cpfold_train.model.config import PairformerConfig
from cpfold_train.parallel.grid import Grid

LARGEST_PART = 1 / 3
"""Of the device's memory that what is kept may take: weights, the blocks at work and losses need the rest."""
HOST_PART = 3 / 4
"""Of the host's memory that may be pinned for what is kept."""
LEAST_TOKENS = 3000
"""From which on attention's results go to the host. The time of attention grows with N for each pair, and that of the
way of its result to the host does not: on an H100 both are about 5 ns at 3,072 tokens, and the blocks of a forward pass
then take as long as all that they leave on the host."""


class Room(NamedTuple):
    """What a rank on a GPU has.

    Attributes:
        device_bytes: memory of its GPU.
        host_bytes: its part of the memory of the host.
        kernels: ``torch``, ``triton`` or ``cuequivariance``.
    """

    device_bytes: float
    host_bytes: float
    kernels: str


def room_of(config: TrainConfig, grid: Grid, device: str) -> Room | None:
    """Of a rank of the grid on the device of this name (:func:`cpfold_train.devices.find_device`); None on CPU."""
    found = find_device(device, grid.world_size)
    if found.capability is None:
        return None
    ranks = min(grid.world_size / config.trainer.num_nodes, found.per_node)
    kernels = kernels_on(found, device, config.kernels, config.trainer.precision).name
    return Room(found.memory, found.host_memory / ranks, kernels)


def with_default_memory(config: TrainConfig, grid: Grid, room: Room | None) -> TrainConfig:
    """The configuration with ``memory.offload`` and ``memory.keep_attention`` decided, by size.

    On a GPU the way to the host and back runs beside the computation, so it costs no arithmetic, where grouping blocks
    costs another forward pass; and with what attention gave a block is recomputed in half the time. Only the sizes of
    the largest crop and of both memories decide, without a trace.

    Args:
        config: of the run; what it says of either holds.
        grid: the ranks.
        room: of each of them; None on CPU, where what is kept is on the host already, and memory is short.
    """
    memory = config.memory
    if room is None or (memory.offload is not None and memory.keep_attention is not None):
        return config
    open_ended = memory.recompute and not memory.auto
    tiles, attention = between_blocks_bytes(config, grid), attention_bytes(config, grid)
    fits = LARGEST_PART * room.device_bytes
    offload = memory.offload
    if offload is None:
        offload = open_ended and tiles > fits
    keep = memory.keep_attention
    if keep is None:
        has_room = keeps_on_host(config, grid, room) if offload else tiles + attention <= fits
        keep = open_ended and room.kernels != "cuequivariance" and has_room
    return replace(config, memory=replace(memory, offload=offload, keep_attention=keep))


def keeps_on_host(config: TrainConfig, grid: Grid, room: Room) -> bool:
    """Whether the results of attention go to the host where what is between blocks does."""
    wanted = between_blocks_bytes(config, grid) + attention_bytes(config, grid)
    return config.largest_crop >= LEAST_TOKENS and wanted <= HOST_PART * room.host_bytes


def between_blocks_bytes(config: TrainConfig, grid: Grid) -> float:
    """Bytes of the tiles of z that a rank keeps between groups of blocks until the backward pass comes to them."""
    model = config.model
    tile = tile_elements(config, grid, config.largest_crop) * (
        2 if config.memory.residual == "bf16" else z_width(config)
    )
    blocks = model.pairformer.num_blocks + model.msa.msa_blocks + _confidence(config).num_blocks
    return tile * blocks / config.memory.blocks_at_once


def attention_bytes(config: TrainConfig, grid: Grid) -> float:
    """Bytes of the results of triangle attention that a rank keeps with ``memory.keep_attention``."""
    model = config.model
    stacks: list[tuple[Any, int]] = [
        (model.template, model.template.template_blocks * config.data.max_templates),
        (model.msa, model.msa.msa_blocks),
        *((stack, stack.num_blocks) for stack in (model.pairformer, _confidence(config))),
    ]
    return sum(attention_bytes_of(config, grid, stack, blocks) for stack, blocks in stacks)


def attention_bytes_of(config: TrainConfig, grid: Grid, stack: Any, blocks: int) -> float:
    """Of so many blocks of one stack."""
    width = {"64-true": 8, "32-true": 4}.get(str(config.trainer.precision), 2)
    pairs = tile_elements(config, grid, config.largest_crop) / config.model.token_z
    # Two attentions a block; of each its result, and the log-sum-exp in fp32.
    return 2 * blocks * pairs * stack.pairwise_num_heads * (stack.pairwise_head_width * width + 4)


def _confidence(config: TrainConfig) -> PairformerConfig:
    """Its Pairformer, for all samples that it is trained with."""
    pairformer = config.model.confidence.pairformer
    samples = config.diffusion.samples if config.loss.of_confidence else 0
    return replace(pairformer, num_blocks=samples * pairformer.num_blocks)


def tile_elements(config: TrainConfig, grid: Grid, crop_size: int) -> int:
    """Elements of a rank's tile of z, of a batch of samples with so many tokens."""
    n = grid.pad_tokens(crop_size)
    return config.batch_size * (n // grid.rows) * (n // grid.cols) * config.model.token_z


def z_width(config: TrainConfig) -> int:
    """Bytes of an element of z within blocks."""
    return {"64-true": 8, "bf16-true": 2}.get(str(config.trainer.precision), 4)
