"""Plans on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from cpfold_train.devices import find_device
from cpfold_train.model.config import MemoryConfig
from cpfold_train.plan.command import memory_settings
from cpfold_train.plan.depth import by_category, by_module
from cpfold_train.plan.estimate import ASSUMPTIONS, FLOOR, Costs
from cpfold_train.plan.plan import Plan
from cpfold_train.plan.units import size_text, time_text
from cpfold_train.simulate.trace import CATEGORIES, Moment

_SHOWN, _DEAREST, _WIDE = 8, 24, 150
"""Modules and operations that are worth a line, of what is held and sent and of what takes time; columns of text."""


def show_plan(found: Plan, validation: Moment | None = None, command: str = "") -> None:
    """One plan in full.

    Args:
        validation: what is held at the peak of validation.
        command: runs it; "" where it is no run of ``train.py``.
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
    table.add_row("peak of tensors", size_text(found.peak))
    table.add_row("the process itself", _process_text(found))
    table.add_row("in all", f"{size_text(found.peak + found.process)} of {size_text(found.memory)}: {_verdict(found)}")
    table.add_row("at that moment runs", found.phase)
    if validation is not None:
        table.add_row("peak of validation", size_text(sum(validation.values())))
    table.add_row("sent by context parallelism", size_text(sum(costs.work.sent_bytes.values())))
    if costs.gradient_bytes:
        shared = "sent by FSDP" if config.parallel.fsdp else "sent to sum gradients"
        table.add_row(shared, size_text(costs.gradient_bytes))
    table.add_row("floating-point operations", f"{sum(costs.work.flops.values()):.3g}")
    table.add_row("time, estimated", time_text(costs.step_s))
    table.add_row("- arithmetic alone", f"{time_text(costs.compute_s)} in {costs.work.kernels:,.0f} launches")
    table.add_row(
        "- exchange alone", f"{time_text(costs.exchange_s)}, of which {time_text(costs.work.waited_s)} waited for"
    )
    if found.host_memory:
        table.add_row("kept in memory of the host", size_text(found.host_memory))
    if costs.host_s:
        table.add_row("- to the host and back alone", time_text(costs.host_s))
    table.add_row("floor of the same work", time_text(sum(part.floor_s for part in costs.parts.values())))
    console.print(table)
    _show_memory(console, found)
    _show_operations(console, costs)
    if sent := costs.work.sent_bytes.most_common(_SHOWN):
        table = Table("operation", "sent", "messages")
        for op, size in sent:
            table.add_row(op, size_text(size), f"{costs.work.messages[op]:,.0f}")
        console.print(table)
    _tell(console, found.device, FLOOR)
    if command:
        _show_command("To run it:", command)


def _show_memory(console: Console, found: Plan) -> None:
    held = by_category(found.held_at_peak)
    memory = Table("memory at the peak", "size")
    for name in CATEGORIES:
        memory.add_row(name, size_text(held[name]))
    for name, size in by_module(found.held_at_peak).most_common(_SHOWN):
        memory.add_row(f"made by {name}", size_text(size))
    console.print(memory)


def _show_operations(console: Console, costs: Costs) -> None:
    """What takes longest, and what bounds it."""
    table = Table("module", "operation", "time", "exchange in it", "bound by", "floor", "launches")
    dearest = sorted(costs.parts.items(), key=lambda item: -item[1].seconds)
    for part, cost in dearest[:_DEAREST]:
        cells = time_text(cost.seconds), time_text(cost.exchange_s), cost.bound, time_text(cost.floor_s)
        table.add_row(*part, *cells, f"{cost.work.kernels:,.0f}")
    if rest := [cost for _, cost in dearest[_DEAREST:]]:
        seconds, exchange, floor, launches = (
            sum(values) for values in zip(*((c.seconds, c.exchange_s, c.floor_s, c.work.kernels) for c in rest))
        )
        texts = time_text(seconds), time_text(exchange), "", time_text(floor)
        table.add_row("all others", "", *texts, f"{launches:,.0f}")
    # Names of modules are long, and are cut where the terminal is narrow.
    Console(width=max(console.width, _WIDE)).print(table)


def show_proposals(found: list[Plan], device: str, crop_size: int, gpus: int, command: str = "") -> None:
    """Plans beside each other, fastest first.

    Args:
        command: runs the first.
    """
    console = Console()
    if not found:
        console.print(
            f"nothing fits crop_size={crop_size} on up to {gpus} of {device}: type more gpus=N or another device"
        )
        return
    title = f"crop_size={crop_size} on up to {gpus} of {device}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("cp.grid", "dp", "GPUs"):
        table.add_column(name, justify="right")
    # What is typed is never cut: an option a line.
    table.add_column("memory options", no_wrap=True, overflow="fold")
    for name in ("memory", "sent", "step", "GPU time"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in found:
        table.add_row(
            str(p.grid),
            str(p.grid.dp),
            str(p.grid.world_size),
            "\n".join(typed_options(p.config.memory)),
            size_text(p.peak + p.process),
            size_text(sum(p.costs.work.sent_bytes.values())),
            time_text(p.costs.step_s),
            time_text(p.costs.step_s * p.grid.world_size),
        )
    console.print(table)
    _tell(console, device)
    _show_command("To run the first:", command)


def _show_command(title: str, command: str) -> None:
    """On a line of its own, however long, to be copied."""
    print(f"{title}\n    {command}")


def typed_options(memory: MemoryConfig) -> list[str]:
    """What to type to get these memory options."""
    return memory_settings(memory) or ["the defaults"]


def _process_text(found: Plan) -> str:
    if found.process:
        return f"{size_text(found.process)}: Python, torch and other libraries"
    return "CUDA's context, libraries and NCCL: within the tenth that is left free"


def _verdict(found: Plan) -> str:
    return "fits" if found.fits else "does not fit"


def _tell(console: Console, device: str, *more: str) -> None:
    console.print("Estimates assume that " + "; ".join((*ASSUMPTIONS, *more)) + ".", highlight=False)
    console.print(f"Device: {find_device(device, 1).source}.", highlight=False)
