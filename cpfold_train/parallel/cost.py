"""What the two ways of communicating cost, and which of them ``cp.algorithm=auto`` takes.

Numbers are means over the ranks of a grid, forward and backward together; T is the number of elements of a tile of z,
B (N/R) (N/C) c, of as many bytes as what travels has: z, or LN(z) in autocast's dtype. For the triangle multiplication
with outgoing edges:

    all-to-all   sent 6 T (P - 1) / P                    messages 6 (P - 1) g
    ring         sent 3 T (C - 1 + R - 1 / C)            messages 3 (C - 1 + (R + C - gcd(R, C)) (P - 1) / P)

and for the triangle attention around the starting node, with a bias of h channels and keys and values of width 2 w:

    all-to-all   sent 2 T (q + 1 - 2 q / C) + b T (P - 1) h / (c q)
                                                         messages 2 (C - 1 + C / q - 1) g
                                                                  + b (P - 1) k (R + q - gcd(R, q)) / (R q)
    ring         sent 3 T ((C - 1) 2 w + (R - 1 / C) h) / c
                                                         messages as for the triangle multiplication

g is the number of groups, of channels or of rows, that travel one after the other so that one can be worked on
meanwhile. b is 2 where the bias is gathered whole, and 3 where it comes in k chunks of heads, which come once more
in the backward pass. q ranks are replicas of the same rows, each with its own part of the queries and of the bias:
rows cost q times as much then, the bias 1/q. The incoming edges and the ending node are the transpose: their costs are
those on :meth:`~cpfold_train.parallel.grid.Grid.transposed`.

The faster way is the one with fewer bytes, where each message counts as ``MESSAGE_BYTES``, provided that it holds no
more than ``HELD_TILES`` tiles. A ring repeats its products in the backward pass, so it has to be better by a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

from cpfold_train.parallel.grid import Grid

ALGORITHMS = ("auto", "alltoall", "ring")
MESSAGE_BYTES = 1 << 16
"""What a link moves in the 10 microseconds that a message takes to get under way, at 6 GB/s."""
GROUPS = 2
"""Of rows or channels: one group that travels and one that is worked on."""
MORE_GROUPS = 4
"""Of channels, where each rank gets one of every group and messages stay long. Nothing overlaps the first group's way
there and the last one's way back, and with more groups these two are shorter."""
LONG_MESSAGE = 1 << 20
"""Bytes whose way takes much longer than getting a message under way."""
HELD_TILES = 10
"""The most that an op may hold at a time beside its input and its result."""


@dataclass(frozen=True)
class Cost:
    """Of one op on one rank, forward and backward.

    Attributes:
        sent: tiles of z.
        messages: their number.
        held: tiles of z, at the peak.
    """

    sent: float
    messages: float
    held: float


def triangle_multiplication_cost(grid: Grid, c: int, algorithm: str, tile_bytes: float = 0) -> Cost:
    """Of the outgoing edges by ``alltoall`` or ``ring``, for z of ``c`` channels and tiles of so many bytes."""
    rows, cols, p = grid.rows, grid.cols, grid.cp_size
    if algorithm == "ring":
        return Cost(3 * (cols - 1 + rows - 1 / cols), 3 * _ring_messages(grid), held=5)
    # With more ranks than channels some hold a whole channel and others nothing.
    return Cost(6 * (p - 1) / p, 6 * (p - 1) * channel_groups(grid, c, tile_bytes), held=3 * ceil(c / p) * p / c)


def triangle_attention_cost(grid: Grid, n: int, c: int, heads: int, width: int, algorithm: str) -> Cost:
    """Around the starting node by ``alltoall`` or ``ring``, for z of ``c`` channels and ``heads`` heads of ``width``
    channels together."""
    rows, cols, p = grid.rows, grid.cols, grid.cp_size
    if algorithm == "ring":
        sent = 3 * ((cols - 1) * 2 * width + (rows - 1 / cols) * heads) / c
        return Cost(sent, 3 * _ring_messages(grid), held=9 * width / c)
    replicas = row_replicas(grid, c)
    chunks = head_chunks(grid, c, heads)
    times = 2 if chunks == 1 else 3
    sent = 2 * (replicas + 1 - 2 * replicas / cols) + times * (p - 1) * heads / (c * replicas)
    # A tile's rows overlap so many of the parts of the queries, on average over the tiles.
    parts_of_a_tile = (rows + replicas - gcd(rows, replicas)) / rows
    messages = 2 * (cols - 1 + cols / replicas - 1) * row_groups(grid, n, c, heads)
    messages += times * (p - 1) * chunks * parts_of_a_tile / replicas
    return Cost(sent, messages, held=2 + replicas)


def head_chunks(grid: Grid, c: int, heads: int) -> int:
    """In how many chunks of heads a rank gathers its part of the triangle bias: each half a tile of z, or one head."""
    return ceil(heads / max(1, c * row_replicas(grid, c) // (2 * grid.cp_size)))


def row_replicas(grid: Grid, c: int) -> int:
    """How many ranks hold the same complete rows in a triangle attention, each for a part of the queries.

    As few as make the bias of one head at most half a tile, and no more than ``HELD_TILES`` allows.
    """
    possible = [q for q in range(1, HELD_TILES - 1) if grid.cols % q == 0]
    return next((q for q in possible if c * q >= 2 * grid.cp_size), possible[-1])


def channel_groups(grid: Grid, c: int, tile_bytes: float) -> int:
    """Groups of channels that a triangle multiplication of tiles of so many bytes exchanges one after the other."""
    if grid.cp_size == 1:
        return 1
    long = tile_bytes >= MORE_GROUPS * grid.cp_size * LONG_MESSAGE
    possible = (MORE_GROUPS, GROUPS) if long else (GROUPS,)
    return next((groups for groups in possible if groups * grid.cp_size <= c), 1)


def row_groups(grid: Grid, n: int, c: int, heads: int) -> int:
    """Groups of rows that a triangle attention exchanges one after the other.

    Where the bias comes in chunks of heads there is one group: each of several would receive all chunks again.
    """
    divisible = n // grid.rows % (GROUPS * grid.cols) == 0
    return GROUPS if grid.cols > 1 and divisible and head_chunks(grid, c, heads) == 1 else 1


def choose(algorithm: str, ring: Cost, alltoall: Cost, tile_bytes: int) -> str:
    """``alltoall`` or ``ring``: what was asked for, or what the model says if that is ``auto``."""
    if algorithm != "auto":
        return algorithm
    if alltoall.held > HELD_TILES:
        return "ring"
    if ring.held > HELD_TILES:
        return "alltoall"
    ring_bytes, alltoall_bytes = (cost.sent * tile_bytes + cost.messages * MESSAGE_BYTES for cost in (ring, alltoall))
    return "ring" if ring_bytes < 0.9 * alltoall_bytes else "alltoall"


def _ring_messages(grid: Grid) -> float:
    """Messages of one pass: one a step along the rows, and one for each overlap of a part of R with a part of C."""
    rows, cols, p = grid.rows, grid.cols, grid.cp_size
    return cols - 1 + (rows + cols - gcd(rows, cols)) * (p - 1) / p
