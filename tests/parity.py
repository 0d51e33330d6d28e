"""Asserting that a module on a grid gives what it gives on 1x1, on ranks of the pool."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.parity import (
    ATOMS,
    DEPTHS,
    LENGTHS,
    TOTALS,
    Call,
    Case,
    compared,
    cut,
    join,
    pad,
    random,
    randomise,
    real,
    run,
)

__all__ = ["ATOMS", "DEPTHS", "GRIDS", "LENGTHS", "TOTALS", "check", "check_against", "check_case", "cut", "join"]
__all__ += ["pad", "random", "randomise", "real", "run"]
GRIDS = [(1, 2), (2, 3), (3, 1)]
GRIDS += [pytest.param(grid, marks=pytest.mark.slow) for grid in ((2, 1), (2, 2), (3, 2), (3, 3), (1, 3), (5, 1))]


def check(ranks, rows: int, cols: int, build, call: Call, inputs: dict, placements: dict, out_placement: str) -> None:
    """Assert that a grid gives what 1x1 gives, to 1e-9 in fp64."""
    check_case(ranks, rows, cols, Case(build, call, inputs, placements, out_placement))


def check_case(ranks, rows: int, cols: int, case: Case) -> None:
    """:func:`check` of a case of the package."""
    (serial,) = ranks.run(run, 1, 1, case)
    check_against(serial, ranks, rows, cols, case)


def check_against(serial: dict, ranks, rows: int, cols: int, case: Case) -> None:
    """:func:`check_case` where it is known what 1x1 gives."""
    parts = ranks.run(run, rows, cols, case)
    for part in parts:
        assert all(part[kind].keys() == serial[kind].keys() for kind in ("inputs", "parameters"))
    for what, (actual, expected) in compared(serial, parts, Grid(rows, cols), case).items():
        torch.testing.assert_close(
            actual, expected, rtol=1e-8, atol=1e-9, msg=lambda text, what=what: f"{what}: {text}"
        )
        assert what == "output" or expected.abs().max() > 0, f"the {what} is zero: the test cannot fail"
