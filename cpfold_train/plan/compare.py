"""Plans beside real runs of the same configurations, on the CPUs of this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpfold_train.config.compose import compose
from cpfold_train.config.schema import TrainConfig
from cpfold_train.devices import find_device, kernels_on
from cpfold_train.parallel.grid import Grid, parse_grid
from cpfold_train.plan.depth import by_category
from cpfold_train.plan.estimate import speed_of
from cpfold_train.plan.measure import GIVEN_BACK_BYTES, run_once
from cpfold_train.plan.plan import MIB, peak_moment
from cpfold_train.plan.step import trace_step
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.simulate.work_counter import totals

CONFIGURATIONS = (
    "cp.grid=1x1 crop_size=512",
    "cp.grid=1x1 crop_size=384 memory.recompute=false model.pairformer.num_blocks=3",
    "cp.grid=1x2 crop_size=384 model.token_z=64 model.token_s=64 model.pairformer.num_blocks=6 "
    "diffusion.multiplicity=8",
    "cp.grid=2x2 crop_size=768",
    "cp.grid=2x2 crop_size=384 model.token_z=64 model.pairformer.num_blocks=6 memory.blocks_at_once=3 "
    "memory.residual=bf16",
    "cp.grid=1x3 crop_size=384 model.token_z=32 model.msa.msa_blocks=2 diffusion.multiplicity=8 "
    "memory.samples_at_once=2",
    "cp.grid=1x2 crop_size=768 model.token_z=32 memory.recompute_updates=true",
    "cp.grid=2x2 crop_size=512 trainer.precision=bf16-true",
    "cp.grid=1x2 crop_size=384 model.token_z=64 model.token_s=256 model.pairformer.num_blocks=6 parallel.fsdp=true",
)
"""What is compared where nothing is typed."""
SMALL = 32
"""Tokens of a run that shows what a process takes in its first step whatever the size, which no plan knows: pages of
libraries, and what threads and sockets hold. It is added to what is planned."""
_ONE_STEP = (
    "recipe=large_crop",
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "optim.ema_decay=0",
)


def compare(settings: list[str], as_json: bool) -> None:
    """Run one step of each configuration and print what it took beside what its plan says.

    Args:
        settings: of one configuration, instead of ``CONFIGURATIONS``.

    Raises:
        ConfigError: a run fails.
    """
    rows = []
    configurations = [settings] if settings else [text.split() for text in CONFIGURATIONS]
    for typed in track(configurations, "running", console=Console(stderr=True)):
        chosen = [*_ONE_STEP, *typed]
        config = compose(chosen)
        planned, measured = _planned(config), _measured(chosen)
        small = [*chosen, f"crop_size={SMALL}"]
        first_use = max(0.0, _measured(small)["memory_mib"] - _planned(compose(small))["memory_mib"])
        planned |= {"memory_mib": planned["memory_mib"] + first_use, "first_use_mib": first_use}
        rows.append({"settings": " ".join(typed), "planned": planned, "measured": measured})
        if not as_json:
            print(f"{' '.join(typed)}: {_in_words(planned, measured)}", flush=True)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        "run", "sent, MiB: planned", "measured", "memory, MiB: planned", "first use in it", "measured", "difference"
    )
    for row in rows:
        planned, measured = row["planned"], row["measured"]
        off = planned["memory_mib"] / measured["memory_mib"] - 1
        table.add_row(
            row["settings"],
            f"{planned['sent_mib']:.6f}",
            f"{measured['sent_mib']:.6f}",
            f"{planned['memory_mib']:.0f}",
            f"{planned['first_use_mib']:.0f}",
            f"{measured['memory_mib']:.0f}",
            f"{off:+.0%}",
        )
    Console(width=160).print(table)


def _in_words(planned: dict[str, float], measured: dict[str, float]) -> str:
    same = "the same bytes" if planned["sent_mib"] == measured["sent_mib"] else "OTHER BYTES"
    return f"{same}, {planned['memory_mib']:.0f} MiB planned and {measured['memory_mib']:.0f} measured"


def _planned(config: TrainConfig) -> dict[str, float]:
    """Of rank 0: bytes that the first step sends, and memory above what a process holds before it."""
    grid = Grid(*parse_grid(config.cp.grid), int(config.dp))
    device = find_device("cpu", grid.world_size)
    config = replace(config, kernels=kernels_on(device, "cpu", config.kernels, config.trainer.precision).name)
    (batch,) = batches_of_data(config, grid, 1)
    trace = trace_step(config, grid, batch, speed_of(device, grid), on_host=True, large_bytes=GIVEN_BACK_BYTES)
    recycling = int(np.random.default_rng([config.seed, 0]).integers(0, config.model.recycling_steps + 1))
    work = totals(trace.counters).plus(totals(trace.cycle), recycling - trace.recycling)
    work = work.plus(totals(trace.sampling_step), config.diffusion.sampling_steps - trace.sampling)
    held = by_category(peak_moment(trace)[1])
    # Weights and their average are there before; the optimizer's moments come after the first backward pass.
    grown = sum(size for name, size in held.items() if name not in ("parameters", "average", "optimizer"))
    return {"sent_mib": sum(work.sent_bytes.values()) / MIB, "memory_mib": grown / MIB}


def _measured(settings: list[str]) -> dict[str, float]:
    """The same of a real run."""
    result = run_once(settings, give_back=True)
    return {"sent_mib": result["sent_mib"][0], "memory_mib": result["peak_memory_above_baseline_mib"][0]}
