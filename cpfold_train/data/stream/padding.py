"""To what sizes the samples of a batch are padded. Padding is masked and changes no result."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from cpfold_train.parallel.grid import Grid

GPU_MULTIPLE = 16
"""Tokens along each side of a tile on a GPU are a multiple of this: matrix units want rows of bf16 to begin at
multiples of 16 bytes, those for fp8 want twice as many elements, and cuEquivariance's kernels for Blackwell take
multiples of 8."""


@dataclass(frozen=True)
class Padding:
    """What sizes are multiples of, beside what the grid needs.

    Attributes:
        side: tokens along each side of a tile.
        tokens, rows, atoms: of a whole sample; ``rows`` are of its alignment.
    """

    side: int = 1
    tokens: int = 1
    rows: int = 1
    atoms: int = 1

    def sizes(self, grid: Grid, tokens: int, rows: int, atoms: int) -> tuple[int, int, int]:
        """The smallest numbers of tokens, MSA rows and atoms that hold those of a sample, and that the grid divides."""
        return (
            grid.pad_tokens(_up(tokens, self.tokens), self.side),
            grid.pad_rows(_up(rows, self.rows)),
            grid.pad_atoms(_up(atoms, self.atoms)),
        )


def in_buckets(number: int | None, side: int, crop_size: int, max_rows: int) -> Padding:
    """Padding to few sizes, so that shapes come again, and with them what was compiled or captured for them.

    Of tokens and MSA rows there are so many sizes up to the most that a sample may have. Tokens differ in their number
    of atoms, so of atoms the sizes are the multiples of ``crop_size``: eight where there are eight atoms a token.

    Args:
        number: of sizes; None for no more padding than needed.
        side: of :class:`Padding`.
        crop_size, max_rows: the most tokens and MSA rows of a sample.
    """
    if number is None:
        return Padding(side)
    return Padding(side, ceil(crop_size / number), ceil(max_rows / number), crop_size)


def _up(size: int, step: int) -> int:
    return ceil(size / step) * step
