"""Run a training step on tensors that say they are on cuda:0, and print where the host has to wait for the device.

python -m tests.fake_cuda.step GUARD_LIBRARY SETTING...
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.fake_cuda import device

ROOT = Path(__file__).parents[2]
WAITS = {
    "_local_scalar_dense": "a figure is read",
    "nonzero": "a size is read",
    "masked_select": "a size is read",
    "_unique2": "a size is read",
    "unique_consecutive": "a size is read",
    "unique_dim": "a size is read",
    "bincount": "a size is read",
    "equal": "a figure is read",
    "is_nonzero": "a figure is read",
    "allclose": "a figure is read",
}
"""Operators that return to the host what the device has computed."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


def waits(name: str, args: tuple, kwargs: dict, out) -> str | None:
    """Why an operation makes the host wait for the device, None where it does not."""
    from torch import Tensor, uint8
    from torch import bool as boolean

    def on(x) -> str | None:
        return x.device.type if isinstance(x, Tensor) else None

    if not any(on(x) == "cuda" for x in (*_flat(args), *_flat((out,)))):
        return None
    if name in WAITS:
        return WAITS[name]
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "a size is read"
    if name in INDEXED and any(isinstance(x, Tensor) and x.dtype in (boolean, uint8) for x in args[1]):
        return "a size is read"
    if name in INDEXED and any(on(x) == "cpu" for x in args[1]):
        return "an index is copied to the device"
    if name not in ("_to_copy", "copy_"):
        return None
    source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
    if {on(source), on(target)} != {"cpu", "cuda"}:
        return None
    if name == "copy_" and on(source) == "cpu" and not source.dim():
        # A number of Python, which goes with the launch.
        return None
    free = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
    host = source if on(source) == "cpu" else target
    return None if free and getattr(host, "pinned", False) else f"a copy from {on(source)} to {on(target)}"


def _flat(values: tuple) -> Iterator:
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def main(library: str, *settings: str) -> None:
    """Print the waits of each step as JSON, [[[why, line, times], ...], ...]; a "+" is between settings of steps."""
    device.use(Path(library))
    steps = " ".join(settings).split(" + ")
    json.dump([waits_of(step.split()) for step in steps], sys.stdout)


def waits_of(settings: list[str]) -> list[list]:
    """Why, where and how often the host waits for the device in a step of rank 1 of 2x2; of which kind, the first word
    says."""
    import torch

    from cpfold_train.config.compose import compose
    from cpfold_train.data.stream.padding import GPU_MULTIPLE
    from cpfold_train.parallel.grid import Grid
    from cpfold_train.plan import forward, step
    from cpfold_train.simulate.batch import assumed_batch
    from cpfold_train.simulate.trace import Tracer
    from cpfold_train.simulate.work_counter import MEMORY, Speed

    no_time = Speed(lambda kernel: (MEMORY, 0.0), lambda n_bytes, messages: 0.0)
    found: Counter[tuple[str, str]] = Counter()

    class Listing(Tracer):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            name = func._schema.name.partition("::")[2]
            if name == "empty_like" and (kwargs or {}).get("pin_memory"):
                out.pinned = True
            elif why := waits(name, args, kwargs or {}, out):
                found[why, caller()] += 1
            return out

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Event) -> float:
            return 0.0

        def synchronize(self) -> None:
            found["an event is waited for", caller()] += 1

    kind, *settings = settings
    config, grid = compose(settings), Grid(2, 2, rank=1)
    traces = {
        "training": step.trace_step,
        "validation": forward.trace_validation,
        "prediction": forward.trace_prediction,
    }
    with (
        mock.patch.object(step, "Tracer", Listing),
        mock.patch.object(torch.cuda, "Event", Event),
    ):
        traces[kind](config, grid, assumed_batch(config, grid, GPU_MULTIPLE), no_time, False, device="cuda")
    return [[*place, times] for place, times in found.items()]


def caller() -> str:
    """The line of the package that an operation comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "cpfold_train") and path.parent.name not in ("plan", "simulate"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass"


if __name__ == "__main__":
    main(*sys.argv[1:])
