"""Triangle attention: every pair (i, j) attends to the pairs of its row or of its column.

AlphaFold 3, Algorithms 14 (starting node) and 15 (ending node). An all-to-all inside the row group (the column group)
turns tiles into complete rows (columns), on which attention is local; the result goes back the same way. Only the
triangle bias, h channels of N x N, is needed whole by every rank and is gathered. Each rank sends
2 T (C - 1) / C elements forward for the starting node, 2 T (R - 1) / R for the ending node, and (P - 1) T h / c of
bias.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.layouts import everything, tiles, whole_cols, whole_rows
from cpfold_train.parallel.redistribute import finish, redistribute, start

Attend = Callable[[Tensor, Tensor], Tensor]
"""Local attention of complete rows: (rows (B, r, N, c), bias (B, h, N, N)) to (B, r, N, c), each row on its own."""


def triangle_attention_starting(x: Tensor, bias: Tensor, attend: Attend, cp: ContextParallel) -> Tensor:
    """Pair (i, j) attends to the pairs (i, k), with the bias of (j, k).

    Args:
        x: tile (B, N/R, N/C, c).
        bias: tile (B, N/R, N/C, h).
        attend: the attention of complete rows.
        cp: the running grid.

    Returns:
        Tile (B, N/R, N/C, c).
    """
    n, op = x.shape[1] * cp.grid.rows, "triangle_attention_start"
    as_tiles, as_rows = tiles(cp.grid, n, n), whole_rows(cp.grid, n, n)
    x_coming = start(x, cp, cp.all, (1, 2), as_tiles, as_rows, op)
    bias_coming = start(bias.permute(0, 3, 1, 2), cp, cp.all, (2, 3), as_tiles, everything(cp.grid, n, n), op)
    x = attend(finish(x_coming), finish(bias_coming))
    return redistribute(x, cp, cp.all, (1, 2), as_rows, as_tiles, op)


def triangle_attention_ending(x: Tensor, bias: Tensor, attend: Attend, cp: ContextParallel) -> Tensor:
    """Pair (i, j) attends to the pairs (k, j), with the bias of (k, i); otherwise as
    :func:`triangle_attention_starting`, of which it is the transpose."""
    n, op = x.shape[1] * cp.grid.rows, "triangle_attention_end"
    as_tiles, as_cols = tiles(cp.grid, n, n), whole_cols(cp.grid, n, n)
    x_coming = start(x, cp, cp.all, (1, 2), as_tiles, as_cols, op)
    bias_coming = start(bias.permute(0, 3, 1, 2), cp, cp.all, (2, 3), as_tiles, everything(cp.grid, n, n), op)
    x = attend(finish(x_coming).transpose(1, 2), finish(bias_coming).mT).transpose(1, 2)
    return redistribute(x, cp, cp.all, (1, 2), as_cols, as_tiles, op)
