"""The phases in their order: what each does, and its fraction of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cpfold_train.gpu_check.exactness import compare_draws, compare_with_cpu
from cpfold_train.gpu_check.machine import look
from cpfold_train.gpu_check.precision import measure_errors
from cpfold_train.gpu_check.ranks import compare_ranks
from cpfold_train.gpu_check.rates import measure_rates
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.gpu_check.step import find_largest, plan_and_measure
from cpfold_train.gpu_check.tiles import measure_blocks, measure_cores

Results = dict[str, Any]
"""The file that is written: ``device`` and ``rates``, and by phase what was found."""


class Phase(NamedTuple):
    """One phase.

    Attributes:
        title: what it shows.
        share: of the time that is left for it and those after it, in relation to theirs.
        run: writes entries, from the results of the phases before it.
    """

    title: str
    share: float
    run: Callable[[Record, Scope, Results], None]


PHASES = {
    "machine": Phase("the machine and its packages", 2, lambda r, s, _: look(r, s)),
    "parity": Phase("every op and block in fp64 against the CPU", 10, lambda r, s, _: compare_with_cpu(r, s)),
    "draws": Phase("random draws bit by bit", 2, lambda r, s, _: compare_draws(r, s)),
    "ranks": Phase("several ranks against one", 14, lambda r, s, known: compare_ranks(r, s, gpus_of(known))),
    "precision": Phase("errors of each precision and kernel", 8, lambda r, s, _: measure_errors(r, s)),
    "rates": Phase("what the card reaches", 6, lambda r, s, known: measure_rates(r, s, gpus_of(known))),
    "blocks": Phase("blocks of one rank of 2x2", 22, lambda r, s, known: measure_blocks(r, s, known["rates"])),
    "cores": Phase("triangle attention alone", 4, lambda r, s, _: measure_cores(r, s)),
    "step": Phase("a training step of Boltz-2", 18, lambda r, s, known: plan_and_measure(r, s, known)),
    "largest": Phase("the largest crop that runs", 14, lambda r, s, _: find_largest(r, s)),
}


def gpus_of(known: Results) -> int:
    """GPUs of this machine."""
    return known["device"].get("count", 1)
