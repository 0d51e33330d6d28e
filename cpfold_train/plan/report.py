"""Plans on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cpfold_train.devices import find_device
from cpfold_train.model.config import MemoryConfig
from cpfold_train.plan.depth import by_category, by_module
from cpfold_train.plan.estimate import ASSUMPTIONS
from cpfold_train.plan.plan import GIB, MIB, Plan
from cpfold_train.plan.trace import CATEGORIES

_SHOWN = 8
"""Modules and operations that are worth a line."""


def show_plan(found: Plan) -> None:
    """One plan in full."""
    console, config, costs = Console(), found.config, found.costs
    title = f"crop_size={config.crop_size} on {found.grid}"
    title += f", dp={found.grid.dp}, {found.device}, {config.trainer.precision}; one rank, one optimizer step"
    table = Table("figure", "value", title=title)
    table.add_row("parameters", f"{found.parameters / 1e6:.1f} million")
    table.add_row("peak memory", f"{found.peak / GIB:.2f} GiB of {found.memory / GIB:.1f}: {_verdict(found)}")
    table.add_row("at that moment runs", found.phase)
    table.add_row("sent by context parallelism", f"{sum(costs.work.sent_bytes.values()) / MIB:,.0f} MiB")
    shared = "sent by FSDP" if config.parallel.fsdp else "sent to sum gradients"
    table.add_row(shared, f"{costs.gradient_bytes / MIB:,.0f} MiB")
    table.add_row("floating-point operations", f"{sum(costs.work.flops.values()):.3g}")
    table.add_row("time of a step, estimated", f"{costs.step_s:.3g} s")
    table.add_row("- arithmetic alone", f"{costs.compute_s:.3g} s in {costs.work.kernels:,.0f} kernels")
    table.add_row("- exchange alone", f"{costs.exchange_s:.3g} s")
    if costs.host_s:
        table.add_row("- to the host and back alone", f"{costs.host_s:.3g} s")
    console.print(table)

    held = by_category(found.fullest)
    memory = Table("memory at the peak", "GiB")
    for name in CATEGORIES:
        memory.add_row(name, f"{held[name] / GIB:.3f}")
    for name, size in by_module(found.fullest).most_common(_SHOWN):
        memory.add_row(f"made by {name}", f"{size / GIB:.3f}")
    console.print(memory)
    if sent := costs.work.sent_bytes.most_common(_SHOWN):
        table = Table("operation", "sent, MiB", "messages")
        for op, size in sent:
            table.add_row(op, f"{size / MIB:,.1f}", f"{costs.work.messages[op]:,.0f}")
        console.print(table)
    _tell(console, found.device)


def show_proposals(found: list[Plan], device: str, crop_size: int, gpus: int) -> None:
    """Plans beside each other, fastest first."""
    console = Console()
    if not found:
        console.print(
            f"nothing fits crop_size={crop_size} on up to {gpus} of {device}: type more gpus=N or another device"
        )
        return
    table = Table(
        "grid",
        "GPUs",
        "memory levers",
        "peak, GiB",
        "sent, MiB",
        "step, s",
        "GPU seconds",
        title=f"crop_size={crop_size}",
    )
    for p in found:
        table.add_row(
            f"cp.grid={p.grid}",
            str(p.grid.world_size),
            " ".join(typed_levers(p.config.memory)),
            f"{p.peak / GIB:.1f}",
            f"{sum(p.costs.work.sent_bytes.values()) / MIB:,.0f}",
            f"{p.costs.step_s:.3g}",
            f"{p.costs.step_s * p.grid.world_size:.3g}",
        )
    console.print(table)
    _tell(console, device)


def typed_levers(memory: MemoryConfig) -> list[str]:
    """What to type to get these levers."""
    plain = MemoryConfig()
    typed = [f"memory.{key}={_typed(value)}" for key, value in vars(memory).items() if value != getattr(plain, key)]
    return typed or ["the defaults"]


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(found: Plan) -> str:
    return "fits" if found.fits else "does not fit"


def _tell(console: Console, device: str) -> None:
    console.print("Estimates assume that " + "; ".join(ASSUMPTIONS) + ".", highlight=False)
    console.print(f"Device: {find_device(device, 1).source}.", highlight=False)
