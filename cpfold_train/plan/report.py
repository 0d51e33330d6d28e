"""Plans on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cpfold_train.devices import find_device
from cpfold_train.model.config import MemoryConfig
from cpfold_train.plan.depth import by_category, by_module
from cpfold_train.plan.estimate import ASSUMPTIONS, FLOOR, Costs
from cpfold_train.plan.plan import GIB, MIB, Plan
from cpfold_train.simulate.trace import CATEGORIES, Moment

_SHOWN, _DEAREST, _WIDE = 8, 24, 150
"""Modules and operations that are worth a line, of what is held and sent and of what takes time; columns of text."""


def show_plan(found: Plan, validation: Moment | None = None) -> None:
    """One plan in full.

    Args:
        validation: what is held at the peak of validation.
    """
    console, config, costs = Console(), found.config, found.costs
    title = (
        f"crop_size={config.crop_size} on {found.grid}, dp={found.grid.dp}: {found.grid.world_size} of {found.device}, "
    )
    title += f"{config.trainer.precision}; one rank, {found.what}"
    table = Table("quantity", "value", title=title)
    table.add_row("parameters", f"{found.parameters / 1e6:.1f} million")
    table.add_row("kernels", f"{found.kernels.name}: {found.kernels.why}")
    table.add_row("memory options", " ".join(typed_options(config.memory)))
    table.add_row("peak memory", f"{found.peak / GIB:.2f} GiB of {found.memory / GIB:.1f}: {_verdict(found)}")
    table.add_row("at that moment runs", found.phase)
    if validation is not None:
        table.add_row("peak of validation", f"{sum(validation.values()) / GIB:.2f} GiB")
    table.add_row("sent by context parallelism", f"{sum(costs.work.sent_bytes.values()) / MIB:,.0f} MiB")
    if costs.gradient_bytes:
        shared = "sent by FSDP" if config.parallel.fsdp else "sent to sum gradients"
        table.add_row(shared, f"{costs.gradient_bytes / MIB:,.0f} MiB")
    table.add_row("floating-point operations", f"{sum(costs.work.flops.values()):.3g}")
    table.add_row("time, estimated", f"{costs.step_s:.3g} s")
    table.add_row("- arithmetic alone", f"{costs.compute_s:.3g} s in {costs.work.kernels:,.0f} launches")
    table.add_row("- exchange alone", f"{costs.exchange_s:.3g} s, of which {costs.work.waited_s:.3g} s are waited for")
    if found.host_memory:
        table.add_row("kept in memory of the host", f"{found.host_memory / GIB:.2f} GiB")
    if costs.host_s:
        table.add_row("- to the host and back alone", f"{costs.host_s:.3g} s")
    table.add_row("floor of the same work", f"{sum(part.floor_s for part in costs.parts.values()):.3g} s")
    console.print(table)
    _show_memory(console, found)
    _show_operations(console, costs)
    if sent := costs.work.sent_bytes.most_common(_SHOWN):
        table = Table("operation", "sent, MiB", "messages")
        for op, size in sent:
            table.add_row(op, f"{size / MIB:,.1f}", f"{costs.work.messages[op]:,.0f}")
        console.print(table)
    _tell(console, found.device, FLOOR)


def _show_memory(console: Console, found: Plan) -> None:
    held = by_category(found.held_at_peak)
    memory = Table("memory at the peak", "GiB")
    for name in CATEGORIES:
        memory.add_row(name, f"{held[name] / GIB:.3f}")
    for name, size in by_module(found.held_at_peak).most_common(_SHOWN):
        memory.add_row(f"made by {name}", f"{size / GIB:.3f}")
    console.print(memory)


def _show_operations(console: Console, costs: Costs) -> None:
    """What takes longest, and what bounds it."""
    table = Table("module", "operation", "seconds", "exchange in it", "bound by", "floor, s", "launches")
    dearest = sorted(costs.parts.items(), key=lambda item: -item[1].seconds)
    for part, cost in dearest[:_DEAREST]:
        cells = f"{cost.seconds:.3g}", f"{cost.exchange_s:.3g}", cost.bound, f"{cost.floor_s:.3g}"
        table.add_row(*part, *cells, f"{cost.work.kernels:,.0f}")
    if rest := [cost for _, cost in dearest[_DEAREST:]]:
        seconds, exchange, floor, launches = (
            sum(values) for values in zip(*((c.seconds, c.exchange_s, c.floor_s, c.work.kernels) for c in rest))
        )
        table.add_row("all others", "", f"{seconds:.3g}", f"{exchange:.3g}", "", f"{floor:.3g}", f"{launches:,.0f}")
    # Names of modules are long, and are cut where the terminal is narrow.
    Console(width=max(console.width, _WIDE)).print(table)


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
        "memory options",
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
            " ".join(typed_options(p.config.memory)),
            f"{p.peak / GIB:.1f}",
            f"{sum(p.costs.work.sent_bytes.values()) / MIB:,.0f}",
            f"{p.costs.step_s:.3g}",
            f"{p.costs.step_s * p.grid.world_size:.3g}",
        )
    console.print(table)
    _tell(console, device)


def typed_options(memory: MemoryConfig) -> list[str]:
    """What to type to get these memory options."""
    plain = MemoryConfig()
    typed = [f"memory.{key}={_typed(value)}" for key, value in vars(memory).items() if value != getattr(plain, key)]
    return typed or ["the defaults"]


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(found: Plan) -> str:
    return "fits" if found.fits else "does not fit"


def _tell(console: Console, device: str, *more: str) -> None:
    console.print("Estimates assume that " + "; ".join((*ASSUMPTIONS, *more)) + ".", highlight=False)
    console.print(f"Device: {find_device(device, 1).source}.", highlight=False)
