"""The layouts that sharded tensors take: which box of (rows, columns) each rank holds.

Every function lists all ranks of a replica in the order of ``cp.all``, row of the grid by row of the grid; "rows" and
"cols" are those of the tensor at hand: tokens x tokens for the pair representation, sequences x tokens for the MSA.
"""

from __future__ import annotations

from cpfold_train.parallel.grid import Grid, Interval, split
from cpfold_train.parallel.redistribute import Layout


def tiles(grid: Grid, rows: int, cols: int) -> Layout:
    """Rank (I, J) holds the I-th of R parts of the rows and the J-th of C parts of the columns: how z and m lie."""
    return tuple((r, c) for r in split(rows, grid.rows) for c in split(cols, grid.cols))


def mirrored_tiles(grid: Grid, n: int) -> Layout:
    """Rank (I, J) holds the tile that, transposed, covers its own tile of an n x n tensor."""
    return swapped(tiles(grid, n, n))


def whole_rows(grid: Grid, rows: int, cols: int, sharers: int = 1) -> Layout:
    """Each rank holds complete rows of its tile: the C ranks of a grid row share them out, every ``sharers`` of them
    holding the same ones."""
    size, places = rows // grid.cp_size * sharers, grid.cols // sharers
    first = [row * places + col % places for row in range(grid.rows) for col in range(grid.cols)]
    return tuple(((f * size, (f + 1) * size), (0, cols)) for f in first)


def whole_cols(grid: Grid, rows: int, cols: int, sharers: int = 1) -> Layout:
    """As :func:`whole_rows`, for the columns and the R ranks of a grid column."""
    size, places = cols // grid.cp_size * sharers, grid.rows // sharers
    first = [col * places + row % places for row in range(grid.rows) for col in range(grid.cols)]
    return tuple(((0, rows), (f * size, (f + 1) * size)) for f in first)


def col_shares(grid: Grid, n: int, sharers: int) -> tuple[Interval, ...]:
    """The part of n that is each rank's among the ``sharers`` of :func:`whole_rows`; its tile's columns are in it."""
    parts = split(n, sharers)
    return tuple(parts[col * sharers // grid.cols] for _ in range(grid.rows) for col in range(grid.cols))


def row_shares(grid: Grid, n: int, sharers: int) -> tuple[Interval, ...]:
    """As :func:`col_shares`, for :func:`whole_cols` and the rows of its tile."""
    parts = split(n, sharers)
    return tuple(parts[row * sharers // grid.rows] for row in range(grid.rows) for _ in range(grid.cols))


def row_bands(grid: Grid, rows: int, cols: int) -> Layout:
    """Rank (I, J) holds all columns of the I-th of R parts of the rows."""
    return tuple((r, (0, cols)) for r in split(rows, grid.rows) for _ in range(grid.cols))


def bands_of_tile_cols(grid: Grid, n: int) -> Layout:
    """Rank (I, J) holds, of an n x n tensor, all columns of those rows whose tokens are its tile's columns."""
    return tuple((c, (0, n)) for _, c in tiles(grid, n, n))


def all_rows_of_tile_rows(grid: Grid, rows: int, n: int) -> Layout:
    """Rank (I, J) holds, of a rows x n tensor, all rows of those tokens that are the rows of its pair tile."""
    return tuple(((0, rows), r) for r, _ in tiles(grid, n, n))


def all_rows_of_tile_cols(grid: Grid, rows: int, n: int) -> Layout:
    """Rank (I, J) holds, of a rows x n tensor, all rows of those tokens that are the columns of its pair tile."""
    return tuple(((0, rows), c) for _, c in tiles(grid, n, n))


def everything(grid: Grid, rows: int, cols: int) -> Layout:
    """Every rank holds all of it."""
    return (((0, rows), (0, cols)),) * grid.cp_size


def in_one_dim(intervals: tuple[Interval, ...]) -> Layout:
    """Boxes of a single dim: ``intervals[p]`` for rank p."""
    return tuple((interval,) for interval in intervals)


def with_dim(intervals: tuple[Interval, ...], layout: Layout) -> Layout:
    """Boxes with one more dim in front: ``intervals[p]`` for rank p."""
    return tuple((interval, *box) for interval, box in zip(intervals, layout))


def swapped(layout: Layout) -> Layout:
    """The same boxes of the transposed tensor."""
    return tuple((second, first) for first, second in layout)


def row_parts(grid: Grid, n: int, step: int = 0) -> tuple[Interval, ...]:
    """The rows of each rank's tile, or those that lie ``step`` tiles further around the grid."""
    parts = split(n, grid.rows)
    return tuple(parts[(row + step) % grid.rows] for row in range(grid.rows) for _ in range(grid.cols))


def col_parts(grid: Grid, n: int, step: int = 0) -> tuple[Interval, ...]:
    """The columns of each rank's tile, or those that lie ``step`` tiles further around the grid."""
    parts = split(n, grid.cols)
    return tuple(parts[(col + step) % grid.cols] for _ in range(grid.rows) for col in range(grid.cols))
