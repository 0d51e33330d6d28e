"""Dropout whose masks do not depend on the grid (AlphaFold 3, Algorithms 11 and 17: DropoutRowwise, DropoutColumnwise).

A mask is drawn for whole rows or whole columns at their global positions, in fp32 as Boltz does.
"""

from __future__ import annotations

from torch import Tensor

from cpfold_train.parallel.grid import Interval
from cpfold_train.parallel.random import RandomStreams


def row_factors(p: float, rows: Interval, draws: RandomStreams | None) -> Tensor | None:
    """With what each row is multiplied: 0 with probability ``p``, else 1 / (1 - p).

    Args:
        p: probability.
        rows: global positions of the rows.
        draws: streams (..., B) of a site, or of several at once; None in evaluation.

    Returns:
        (..., B, rows) in fp32; None where rows stay as they are.
    """
    return None if draws is None or p == 0 else (draws.uniform(*rows) >= p).float() / (1 - p)


def drop_rows(x: Tensor, factors: Tensor | None) -> Tensor:
    """x (B, rows, ..., ...), a pair tile or an MSA block, times ``factors`` (B, rows) of :func:`row_factors`."""
    return x if factors is None else x * factors[:, :, None, None].to(x.dtype)
