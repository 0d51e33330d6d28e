"""The grid: how many ranks share one sample, and which part of it each of them holds.

Pure geometry: integers and slices. Nothing here needs a process group, so data workers use it as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cpfold_train.errors import ConfigError

Interval = tuple[int, int]
"""Half-open range ``(start, stop)`` of global indices."""

_Tile = TypeVar("_Tile")

ATOM_WINDOW = 32
"""Query atoms of a window of the atom attention; atoms are sharded by whole windows."""


@dataclass(frozen=True)
class Grid:
    """One rank's position in a world of ``dp`` replicas, each a grid of ``rows`` x ``cols`` ranks.

    Ranks are numbered replica by replica and row by row: ``rank = (dp_index * rows + row) * cols + col``, so the
    ranks of one grid row, which exchange most, are neighbours and stay on one node where they can.

    Attributes:
        rows: R, number of tiles along the first pair dim (mesh axis ``cp_row``).
        cols: C, number of tiles along the second pair dim (mesh axis ``cp_col``).
        dp: number of replicas (mesh axis ``dp``).
        rank: this rank in the world, ``0 <= rank < dp * rows * cols``.
        by_columns: ranks are numbered column by column instead: the view of :meth:`transposed`.
    """

    rows: int = 1
    cols: int = 1
    dp: int = 1
    rank: int = 0
    by_columns: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.dp) < 1:
            raise ConfigError(
                f"a grid needs at least one row, column and replica, not {self.dp} x {self}: try cp.grid=1x1 dp=1"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside a world of {self.world_size} ranks (dp={self.dp}, cp.grid={self})"
            )

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def cp_size(self) -> int:
        """P = R * C, the number of ranks that share one sample."""
        return self.rows * self.cols

    @property
    def world_size(self) -> int:
        """dp * R * C."""
        return self.dp * self.cp_size

    @property
    def dp_index(self) -> int:
        """Which replica this rank belongs to."""
        return self.rank // self.cp_size

    @property
    def cp_index(self) -> int:
        """This rank's number inside its replica, row by row (in a transposed view, column by column)."""
        return self.rank % self.cp_size

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each rank of a replica, in the order of ranks."""
        if self.by_columns:
            return tuple((row, col) for col in range(self.cols) for row in range(self.rows))
        return tuple((row, col) for row in range(self.rows) for col in range(self.cols))

    @property
    def row(self) -> int:
        """Row I of this rank's tile."""
        return self.positions[self.cp_index][0]

    @property
    def col(self) -> int:
        """Column J of this rank's tile."""
        return self.positions[self.cp_index][1]

    def transposed(self) -> Grid:
        """The same ranks as the grid of the transposed pair representation.

        The rank of tile (I, J) here is that of tile (J, I) there, and its rows are the columns here: what an op does by
        columns is the op by rows, on transposed tensors and this view.
        """
        return replace(self, rows=self.cols, cols=self.rows, by_columns=not self.by_columns)

    def rows_within_nodes(self, per_node: int) -> bool:
        """Whether each row of each replica's grid has its ranks on one machine, of ``per_node`` ranks."""
        return self.world_size <= per_node or per_node % self.cols == 0

    def pad_tokens(self, n: int, side: int = 1) -> int:
        """Smallest multiple of R * C that holds ``n`` tokens, so that every split of a dim over ranks is even; and such
        that both sides of a tile are multiples of ``side``."""
        step = math.lcm(self.cp_size, self.rows * side, self.cols * side)
        return max(1, math.ceil(n / step)) * step

    def pad_rows(self, n: int) -> int:
        """Smallest multiple of R that holds ``n`` MSA sequences."""
        return max(1, math.ceil(n / self.rows)) * self.rows

    def pad_atoms(self, n: int) -> int:
        """Smallest multiple of R * C windows that holds ``n`` atoms."""
        return self.pad_tokens(math.ceil(n / ATOM_WINDOW)) * ATOM_WINDOW

    def row_tokens(self, n: int) -> Interval:
        """Tokens of the tile's rows, for ``n`` tokens padded by :meth:`pad_tokens`."""
        return split(n, self.rows)[self.row]

    def col_tokens(self, n: int) -> Interval:
        """Tokens of the tile's columns, for ``n`` tokens padded by :meth:`pad_tokens`."""
        return split(n, self.cols)[self.col]

    def msa_rows(self, s: int) -> Interval:
        """MSA sequences held by this rank, for ``s`` sequences padded by :meth:`pad_rows`."""
        return split(s, self.rows)[self.row]

    def atoms(self, n: int) -> Interval:
        """Atoms held by this rank, for ``n`` atoms padded by :meth:`pad_atoms`: ranks in order, row by row."""
        return split(n, self.cp_size)[self.cp_index]


def split(n: int, parts: int) -> tuple[Interval, ...]:
    """Cut ``range(n)`` into ``parts`` contiguous intervals whose lengths differ by at most one, longer ones first."""
    size, longer = divmod(n, parts)
    stops = [size * (p + 1) + min(p + 1, longer) for p in range(parts)]
    return tuple(zip([0, *stops[:-1]], stops))


def join_tiles(tiles: Sequence[_Tile], grid: Grid, concatenate: Callable[..., _Tile], dim: int = 0) -> _Tile:
    """The whole of the tiles of all ranks of a replica, rank by rank.

    Args:
        tiles: (..., N/R, N/C, ...) each.
        grid: of the ranks.
        concatenate: ``torch.cat`` for tensors, ``np.concatenate`` for arrays.
        dim: of the tile's rows; its columns are the next.
    """
    rows = [concatenate(list(tiles[row * grid.cols : (row + 1) * grid.cols]), dim + 1) for row in range(grid.rows)]
    return concatenate(rows, dim)


def parse_grid(text: str) -> tuple[int, int]:
    """Read ``"RxC"``.

    Raises:
        ConfigError: with one sentence that says what to type instead.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", str(text).strip().lower())
    if match is None:
        raise ConfigError(
            f"cp.grid={text} is not ROWSxCOLUMNS: type for example cp.grid=2x2, cp.grid=1x4 or cp.grid=auto"
        )
    rows, cols = int(match[1]), int(match[2])
    if rows < 1 or cols < 1:
        raise ConfigError(f"cp.grid={text} has no ranks: rows and columns start at 1, for example cp.grid=1x2")
    return rows, cols


def squarest(ranks: int, per_node: int | None = None) -> tuple[int, int]:
    """The grid of ``ranks`` ranks with sides as equal as possible, rather more columns than rows.

    Where there are ``per_node`` ranks on each of several machines, only grids count whose rows lie within one.
    """
    sides = [(rows, ranks // rows) for rows in range(1, ranks + 1) if ranks % rows == 0]
    fitting = [(rows, cols) for rows, cols in sides if per_node is None or per_node % cols == 0]
    return min(fitting, key=lambda side: (max(side), side))


def resolve_grid(text: str, dp: int | str, ranks: int | None, per_node: int | None = None) -> tuple[int, int, int]:
    """Decide ``(dp, rows, cols)`` from what the user typed and the number of ranks there are.

    Args:
        text: ``"RxC"`` or ``"auto"``: the squarest grid of the ranks that one replica gets (see :func:`squarest`).
        dp: number of replicas, or ``"auto"`` (as many as the ranks allow; 1 where their number is open).
        ranks: world size fixed by a launcher or by the number of GPUs; None where we may start as many as we like.
        per_node: ranks on each machine, where there are several.

    Raises:
        ConfigError: where the ranks cannot be divided so.
    """
    if dp != "auto" and (not str(dp).isdigit() or int(dp) < 1):
        raise ConfigError(f"dp={dp} is not a number of replicas: type dp=1, dp=2, ... or dp=auto")
    if text == "auto":
        replicas = 1 if dp == "auto" else int(dp)
        available = replicas if ranks is None else ranks
        if available % replicas:
            raise ConfigError(
                f"{ranks} ranks do not divide into dp={replicas} replicas: "
                f"type a dp that divides {ranks}, for example dp=1"
            )
        return replicas, *squarest(available // replicas, per_node)
    rows, cols = parse_grid(text)
    fitting = 1 if ranks is None else max(1, ranks // (rows * cols))
    replicas = fitting if dp == "auto" else int(dp)
    world = replicas * rows * cols
    if ranks is not None and world != ranks:
        fits = "x".join(map(str, squarest(ranks // replicas))) if ranks % replicas == 0 else "auto"
        raise ConfigError(
            f"cp.grid={rows}x{cols} with dp={replicas} needs {world} ranks and there are {ranks}: "
            f"type cp.grid={fits} dp={replicas if fits != 'auto' else 1}, or start {world} ranks"
        )
    return replicas, rows, cols
