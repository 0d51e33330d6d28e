"""The transposed view of a grid: the same ranks, and the tiles of the transposed tensor."""

from __future__ import annotations

import pytest

from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.layouts import tiles

N = 12


@pytest.mark.parametrize("rank", range(12))
@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (2, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_transposed_grid_has_the_same_ranks_and_transposed_tiles(shape, rank):
    grid = Grid(*shape, dp=2, rank=rank % (2 * shape[0] * shape[1]))
    view = grid.transposed()
    assert view.transposed() == grid
    assert (view.rows, view.cols, view.cp_index, view.dp_index) == (shape[1], shape[0], grid.cp_index, grid.dp_index)
    assert (view.row, view.col) == (grid.col, grid.row) and (view.row, view.col) == view.positions[view.cp_index]
    assert (view.row_tokens(N), view.col_tokens(N)) == (grid.col_tokens(N), grid.row_tokens(N))
    assert tiles(view, N, N) == tuple((cols, rows) for rows, cols in tiles(grid, N, N))
