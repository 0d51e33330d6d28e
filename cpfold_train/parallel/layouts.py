"""The layouts that sharded tensors take: which box of (rows, columns) each rank holds.

Every function lists all ranks of a replica in the order of ``cp.all``; "rows" and "cols" are those of the tensor at
hand: tokens x tokens for the pair representation, sequences x tokens for the MSA. Of a transposed tensor the layouts
are those of :meth:`~cpfold_train.parallel.grid.Grid.transposed`.
"""

from __future__ import annotations

from cpfold_train.parallel.exchange_plan import Layout
from cpfold_train.parallel.grid import Grid, Interval, split


def tiles(grid: Grid, rows: int, cols: int) -> Layout:
    """Rank (I, J) holds the I-th of R parts of the rows and the J-th of C parts of the columns: how z and m lie."""
    return tuple(zip(row_parts(grid, rows), col_parts(grid, cols)))


def whole_rows(grid: Grid, rows: int, cols: int, replicas: int = 1) -> Layout:
    """Each rank holds complete rows of its tile: they are split over the C ranks of a grid row, and each part has
    ``replicas``, on the ranks C / ``replicas`` columns apart."""
    size, parts = rows // grid.cp_size * replicas, grid.cols // replicas
    first = [row * parts + col % parts for row, col in grid.positions]
    return tuple(((f * size, (f + 1) * size), (0, cols)) for f in first)


def query_parts(grid: Grid, n: int, replicas: int) -> tuple[Interval, ...]:
    """The part of n queries that each rank has, where ``replicas`` ranks hold the same :func:`whole_rows`; the columns
    of its tile are in it."""
    parts = split(n, replicas)
    return tuple(parts[col * replicas // grid.cols] for _, col in grid.positions)


def row_bands(grid: Grid, rows: int, cols: int) -> Layout:
    """Rank (I, J) holds all columns of the I-th of R parts of the rows."""
    return tuple((part, (0, cols)) for part in row_parts(grid, rows))


def bands_of_tile_cols(grid: Grid, n: int) -> Layout:
    """Rank (I, J) holds, of an n x n tensor, all columns of those rows whose tokens are its tile's columns."""
    return tuple((part, (0, n)) for part in col_parts(grid, n))


def all_rows_of_tile_rows(grid: Grid, rows: int, n: int) -> Layout:
    """Rank (I, J) holds, of a rows x n tensor, all rows of those tokens that are the rows of its pair tile."""
    return tuple(((0, rows), part) for part in row_parts(grid, n))


def all_rows_of_tile_cols(grid: Grid, rows: int, n: int) -> Layout:
    """Rank (I, J) holds, of a rows x n tensor, all rows of those tokens that are the columns of its pair tile."""
    return tuple(((0, rows), part) for part in col_parts(grid, n))


def everything(grid: Grid, rows: int, cols: int) -> Layout:
    """Every rank holds all of it."""
    return (((0, rows), (0, cols)),) * grid.cp_size


def in_one_dim(intervals: tuple[Interval, ...]) -> Layout:
    """Boxes of a single dim: ``intervals[p]`` for rank p."""
    return tuple((interval,) for interval in intervals)


def with_dim(intervals: tuple[Interval, ...], layout: Layout) -> Layout:
    """Boxes with one more dim in front: ``intervals[p]`` for rank p."""
    return tuple((interval, *box) for interval, box in zip(intervals, layout))


def row_parts(grid: Grid, n: int, step: int = 0) -> tuple[Interval, ...]:
    """The rows of each rank's tile, or those that lie ``step`` tiles further around the grid."""
    parts = split(n, grid.rows)
    return tuple(parts[(row + step) % grid.rows] for row, _ in grid.positions)


def col_parts(grid: Grid, n: int, step: int = 0) -> tuple[Interval, ...]:
    """The columns of each rank's tile, or those that lie ``step`` tiles further around the grid."""
    parts = split(n, grid.cols)
    return tuple(parts[(col + step) % grid.cols] for _, col in grid.positions)
