"""What each fused kernel computes and moves, for a planner, which counts a step without running it.

Kernels are operators of torch in the namespace ``cpfold`` (``torch.library.custom_op``), each with a fake
implementation, so that shapes, memory and order of a step are those of a real one under ``FakeTensorMode``. What torch
cannot know, their arithmetic, is told here, beside the operator's definition::

    @work("attention")
    def _(q, k, v, bias, out) -> Work: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

NAMESPACE = "cpfold"


class Work(NamedTuple):
    """Of one kernel, or of an operator that is planned as one.

    Attributes:
        flops: operations of its matrix products.
        exps: exponentials; on Hopper they bound attention of narrow heads.
        moved_bytes: read from and written to the device's memory; None: each argument and each result once.
        launches: CUDA kernels that it starts.
        l2_bytes: read from L2, where its tiles read much more often from there than from memory.
    """

    flops: float
    exps: float = 0.0
    moved_bytes: float | None = None
    launches: int = 1
    l2_bytes: float = 0.0


Formula = Callable[..., Work | list[Work]]
"""Of an operator's arguments and, last, its result. A list is of kernels that one after another each have a bound."""
WORK: dict[str, Formula] = {}
"""By name of the operator, without namespace."""


def work(name: str) -> Callable[[Formula], Formula]:
    """Say what the operator ``cpfold::name`` does."""

    def register(function: Formula) -> Formula:
        WORK[name] = function
        return function

    return register
