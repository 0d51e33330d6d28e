"""Dropout whose masks do not depend on the grid (AlphaFold 3, Algorithms 11 and 17: DropoutRowwise, DropoutColumnwise).

A mask is drawn for whole rows or whole columns at their global positions, in fp32 as Boltz does.
"""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.grid import Interval
from cpfold_train.parallel.random import Draws


def drop_rows(x: Tensor, p: float, rows: Interval, draws: Draws | None) -> Tensor:
    """Zero each row of a tile with probability ``p`` and scale the others by 1 / (1 - p).

    Args:
        x: (B, rows, ..., ...), a pair tile or an MSA block.
        p: probability.
        rows: global positions of the rows in ``x``.
        draws: streams of this site; None leaves ``x`` as it is.
    """
    factors = row_factors(p, rows, draws)
    return x if factors is None else x * factors[:, :, None, None].to(x.dtype)


def row_factors(p: float, rows: Interval, draws: Draws | None) -> Tensor | None:
    """What :func:`drop_rows` multiplies each row with, for whoever does so itself: (B, rows) in fp32; None where it
    leaves them as they are."""
    return None if draws is None or p == 0 else (draws.uniform(*rows) >= p).float() / (1 - p)
