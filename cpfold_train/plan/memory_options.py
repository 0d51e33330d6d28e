"""Each memory option by itself, compared with none: planned for any device, or measured on the CPUs of this machine."""

from __future__ import annotations

import json

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpfold_train.config.compose import compose
from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.measure import run_once
from cpfold_train.plan.plan import GIB, plan
from cpfold_train.plan.propose import group_size

AS_IT_IS = "as it is"
TWO_STEPS = ("trainer.max_steps=2", "trainer.enable_progress_bar=false", "data.val=[]")
"""The optimizer's moments are there from the end of the first step on."""


def memory_options(config: TrainConfig, chunk_mib: int) -> dict[str, tuple[str, ...]]:
    """What to type for each memory option alone, and for those that go together, by what it is called in the table.

    Args:
        chunk_mib: a quarter of the device's own.
    """
    samples = f"memory.samples_at_once={max(1, config.diffusion.multiplicity // 4)}"
    single = (
        "memory.recompute=false",
        f"memory.blocks_at_once={group_size(config.model.pairformer.num_blocks)}",
        "memory.recompute_updates=true",
        "memory.residual=bf16",
        "memory.offload=true",
        *(("memory.keep_attention=true",) if config.kernels != "cuequivariance" else ()),
        samples,
        f"memory.chunk_mib={chunk_mib}",
        "parallel.fsdp=true",
        "trainer.precision=bf16-true",
    )
    exact = "memory.recompute_updates=true", "memory.offload=true", samples, "parallel.fsdp=true"
    together = (*exact, "memory.residual=bf16")
    return {AS_IT_IS: ()} | {setting: (setting,) for setting in single} | {" ".join(together): together}


def planned_options(settings: list[str], grid: Grid, device: str) -> list[dict]:
    """One row a memory option: ``typed``, ``peak_gib`` of a rank and ``step_s``, estimated.

    Raises:
        ConfigError: there is no such device.
    """
    rows = []
    tried = memory_options(compose(settings), chunk_mib=1 if device == "cpu" else 64)
    for name, typed in track(tried.items(), "planning", console=Console(stderr=True)):
        found = plan(compose([*settings, *typed]), grid, device)
        rows.append({"typed": name, "peak_gib": found.peak / GIB, "step_s": found.costs.step_s})
    return rows


def measured_options(settings: list[str]) -> list[dict]:
    """One row a memory option: ``typed``, ``peak_gib`` of the process that takes most, ``step_s`` of a second step.

    Memory and time are those of two runs: where memory is measured, what is freed is given back, which takes time.

    Raises:
        ConfigError: a run fails.
    """
    rows = []
    tried = memory_options(compose(settings), chunk_mib=1)
    for name, typed in track(tried.items(), "running", console=Console(stderr=True)):
        run = [*settings, *typed, *TWO_STEPS]
        peak = max(run_once(run, give_back=True)["peak_memory_mib"]) / 2**10
        rows.append({"typed": name, "peak_gib": peak, "step_s": run_once(run, give_back=False)["step_s"]})
    return rows


def show_memory_options(settings: list[str], grid: Grid | None, device: str, measure: bool, as_json: bool) -> None:
    """Print the table.

    Raises:
        ConfigError: without a grid, for settings that cannot be planned, or where a run fails.
    """
    if grid is None:
        raise ConfigError("memory options are compared on one grid: type cp.grid=2x2, for example")
    rows = measured_options(settings) if measure else planned_options(settings, grid, device)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    plain = next(row for row in rows if row["typed"] == AS_IT_IS)
    title = "measured on CPU" if measure else f"planned for {device}"
    table = Table("memory option", "peak of a rank, GiB", "of it as it is", "step, s", "of it as it is", title=title)
    for row in rows:
        peak, seconds = row["peak_gib"], row["step_s"]
        ratios = f"{peak / plain['peak_gib']:.2f}", f"{seconds / plain['step_s']:.2f}"
        table.add_row(row["typed"], f"{peak:.2f}", ratios[0], f"{seconds:.3g}", ratios[1])
    Console(width=180).print(table)
