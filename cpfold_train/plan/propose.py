"""Which grids and memory options fit, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cpfold_train.config.memory_default import (
    Room,
    attention_bytes_of,
    keeps_on_host,
    room_of,
    tile_elements,
    with_default_memory,
    z_width,
)
from cpfold_train.config.schema import TrainConfig
from cpfold_train.devices import find_device
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid, squarest
from cpfold_train.plan.estimate import MEMORY_MARGIN
from cpfold_train.plan.plan import Plan, least_held, plan

LEAST_SIDE = 32
"""Tokens that a rank should have of a tile's side at least: below, a grid costs more than it helps."""
HELD_TILES = 6
"""Tiles of z that a block of the Pairformer holds at least, for its backward pass."""
HELD_BETWEEN_UPDATES = 5
"""Of these, where each update is recomputed."""

TYPICAL_TILES = 20
"""Tiles of z that a rank holds at the peak of a step, more or less, where little is kept between blocks: they decide
only what is looked at first."""


def choose_memory(config: TrainConfig, grid: Grid, device: str) -> MemoryConfig:
    """The memory options that cost least time among those that fit the device with a margin.

    Args:
        config: of the run; what it says of memory is not regarded.
        grid: the ranks.
        device: one of :data:`cpfold_train.devices.DEVICES`, or ``cpu``: this machine's memory, divided by its
            ranks.

    Raises:
        ConfigError: nothing fits.
    """
    best = first_that_fits(config, grid, device)
    if best is not None:
        return best.config.memory
    most = memory_presets(config, device)[-1:]
    sharded = replace(config, parallel=replace(config.parallel, fsdp=True))
    fits = grid.world_size > 1 and not config.parallel.fsdp and first_that_fits(sharded, grid, device, most)
    raise ConfigError(
        f"memory=auto finds nothing that fits crop_size={config.crop_size} on cp.grid={grid} of {device}: type "
        + ("parallel.fsdp=true" if fits else "a grid of more ranks or a smaller crop_size")
    )


def plan_run(config: TrainConfig, grid: Grid, device: str, choose: bool) -> Plan:
    """The plan of a run on one grid, with the memory options that the run would have.

    Args:
        config: of the run.
        grid: the ranks.
        device: one of :data:`cpfold_train.devices.DEVICES`, or ``cpu``.
        choose: vary the memory options; else those of the configuration hold.

    Raises:
        ConfigError: there is no such device, or nothing that is chosen fits.
    """
    if choose:
        config = replace(config, memory=choose_memory(config, grid, device))
    return plan(with_default_memory(config, grid, room_of(config, grid, device)), grid, device)


def propose(config: TrainConfig, device: str, gpus: int, dp: int, choose: bool) -> list[Plan]:
    """Plans for grids of 1, 2, 4 ... ranks, as square as may be, ``dp`` of each on up to ``gpus`` ranks: those that
    fit, fastest first.

    Args:
        choose: vary the memory options; else those of the configuration hold.

    Raises:
        ConfigError: there is no such device.
    """
    found, wanted = [], list(grids(config.crop_size, gpus, dp=dp))
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("planning", total=len(wanted))
        for grid in wanted:
            progress.update(task, description=f"planning cp.grid={grid}")
            if choose:
                found.append(first_that_fits(config, grid, device))
            elif may_fit(config, grid, device):
                found.append(plan(config, grid, device))
            progress.advance(task)
    return sorted((p for p in found if p and p.fits), key=lambda p: p.costs.step_s)


def grids(crop_size: int, gpus: int, factor: int = 2, dp: int = 1) -> Iterator[Grid]:
    """Grids of 1, ``factor``, ``factor`` squared ... ranks whose tiles are worth it; ``dp`` of each on up to ``gpus``
    ranks."""
    ranks = 1
    while ranks * dp <= gpus:
        grid = Grid(*squarest(ranks), dp)
        if ranks == 1 or crop_size >= LEAST_SIDE * grid.cols:
            yield grid
        ranks *= factor


def memory_presets(config: TrainConfig, device: str) -> list[MemoryConfig]:
    """Options that save ever more memory, cheap ones first; what a run would decide by size is decided in each.

    On a GPU the host is another memory, and the way there runs beside the computation: it comes before what is computed
    twice.
    """
    blocks, multiplicity = config.model.pairformer.num_blocks, config.diffusion.multiplicity
    grouped = {"blocks_at_once": group_size(blocks)}
    smaller = {"samples_at_once": max(1, multiplicity // 4), "chunk_mib": 64.0}
    presets = [MemoryConfig(recompute=False)]
    if find_device(device, 1).capability is None:
        presets.append(MemoryConfig())
        added = grouped, smaller, {"offload": True}
    else:
        plain = MemoryConfig(offload=False, keep_attention=False)
        presets += [replace(plain, keep_attention=True), plain, MemoryConfig(offload=True, keep_attention=True)]
        added = {"keep_attention": False}, smaller, grouped
    # The last is the only one that rounds.
    for more in (*added, {"recompute_updates": True}, {"residual": "bf16"}):
        presets.append(replace(presets[-1], **more))
    return [preset for i, preset in enumerate(presets) if preset not in presets[:i]]


def group_size(blocks: int) -> int:
    """Blocks to recompute as one: of groups of g, n / g + g are kept.

    It is the smallest g that keeps hardly more than the best does, because FSDP gathers the weights of a whole group.
    """
    kept = {g: blocks // g + g for g in range(1, blocks + 1) if blocks % g == 0}
    return next((g for g, count in kept.items() if count <= 1.25 * min(kept.values())), 1)


def first_that_fits(
    config: TrainConfig, grid: Grid, device: str, presets: list[MemoryConfig] | None = None
) -> Plan | None:
    """The plan with the first of ``presets`` that fits, by default those of :func:`memory_presets`, or None."""
    room = room_of(config, grid, device)
    runs = [replace(config, memory=memory) for memory in presets or memory_presets(config, device)]
    runs = [run for run in runs if _is_worth_it(run, grid, room) and may_fit(run, grid, device)]
    # Where the first is likely to fit, it is tried before anything else is looked at.
    tiles = TYPICAL_TILES * z_width(config) * tile_elements(config, grid, config.crop_size)
    bounded = 0 if tiles > _limit(grid, device) else 1
    for i, run in enumerate(runs):
        if i == bounded and not _may_any_fit(runs[i:], grid, device):
            return None
        if (found := plan(run, grid, device)).fits:
            return found
    return None


def _may_any_fit(runs: list[TrainConfig], grid: Grid, device: str) -> bool:
    """False where a model of few blocks does not fit with all that these runs do to save memory: that one trace tells
    it of all of them. A group of blocks holds more while it is at work than a block does."""
    least = replace(runs[-1], memory=replace(runs[-1].memory, blocks_at_once=1))
    return least_held(least, grid, device) <= _limit(grid, device)


def _limit(grid: Grid, device: str) -> float:
    """The most bytes that a rank may hold."""
    return (1 - MEMORY_MARGIN) * find_device(device, grid.world_size).memory


def _is_worth_it(config: TrainConfig, grid: Grid, room: Room | None) -> bool:
    """Whether the results of attention are kept only where a run can keep them, and on the host wherever a run does.

    There they save more time than the way there takes: where what is between blocks fits the device and they do not,
    all goes to the host.
    """
    memory = config.memory
    if room is None or not memory.recompute:
        return True
    if memory.keep_attention:
        return room.kernels != "cuequivariance" and (not memory.offload or keeps_on_host(config, grid, room))
    return memory.offload or room.kernels == "cuequivariance" or not keeps_on_host(config, grid, room)


def may_fit(config: TrainConfig, grid: Grid, device: str) -> bool:
    """False where the tiles alone that are certainly held do not fit: nothing has to be run to see that.

    Where parts are frozen no tile is certain: what comes before all that is trained keeps nothing.
    """
    finetune = config.finetune
    if finetune.train or finetune.freeze or finetune.lora.patterns:
        return True
    model, memory, item = config.model, config.memory, z_width(config)
    blocks = model.pairformer.num_blocks
    tile = item * tile_elements(config, grid, config.crop_size)
    held = HELD_BETWEEN_UPDATES if memory.recompute_updates else HELD_TILES
    if not memory.recompute:
        kept = held * blocks
    elif memory.offload:
        kept = 0
    else:
        kept = blocks / memory.blocks_at_once * (2 / item if memory.residual == "bf16" else 1)
    least = (kept + held) * tile
    if memory.recompute and memory.keep_attention and not memory.offload:
        least += attention_bytes_of(config, grid, model.pairformer, blocks)
    return least <= _limit(grid, device)
