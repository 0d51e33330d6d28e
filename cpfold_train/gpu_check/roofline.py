"""The least time that the ops of a Pairformer and of an MSA block can take on one rank.

The roofline model (Williams, Waterman and Patterson, Communications of the ACM 52, 2009): an op takes at least as long
as the slowest of its products on matrix units, its reads and writes of the device's memory, and its exponentials, which
bound attention of narrow heads on Hopper (Shah et al., "FlashAttention-3", 2024). Counted are the formulas of the
modules (AlphaFold 3, Algorithms 9 to 17) with z and m in bf16, each op in one kernel where one is possible, so that a
representation is read once and written once and intermediates never are. Messages to other ranks are not counted: what
is timed beside these floors exchanges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel.grid import Grid

BF16 = 2
OPM, PWA_HEADS, PWA = 32, 8, 32
"""Widths of the outer product mean and of pair-weighted averaging."""


@dataclass(frozen=True)
class Roofline:
    """Operations of products in bf16 and in fp32, bytes of memory and exponentials a second."""

    bf16: float
    fp32: float
    memory: float
    exps: float


H100 = Roofline(700e12, 50e12, 3.0e12, 3.6e12)
"""What good kernels reach on an H100 SXM, estimated: 71 % of the data sheet's matrix units, 90 % of its memory, and 16
exponentials a clock of 132 multiprocessors at 1.7 GHz."""


@dataclass(frozen=True)
class OpWork:
    """Of one op and pass: operations in bf16 and in fp32, bytes read and written, exponentials."""

    bf16: float
    fp32: float
    moved: float
    exps: float = 0.0

    def seconds(self, rates: Roofline) -> float:
        """The longest of its times."""
        return max(self.times(rates).values())

    def bound(self, rates: Roofline) -> str:
        """What that is the time of."""
        times = self.times(rates)
        return max(times, key=times.get)

    def times(self, rates: Roofline) -> dict[str, float]:
        """Seconds by resource."""
        products = self.bf16 / rates.bf16 + self.fp32 / rates.fp32
        return {"matrix units": products, "memory": self.moved / rates.memory, "exponentials": self.exps / rates.exps}


ForwardBackward = tuple[OpWork, OpWork]
"""Forward and backward."""


def floors(config: ModelConfig, n: int, sequences: int, grid: Grid) -> dict[str, ForwardBackward]:
    """By op, under the names of ``bench``: what a rank of ``grid`` has to do of N tokens and S sequences."""
    c, s, m, rows, cols = config.token_z, config.token_s, config.msa.msa_s, n // grid.rows, n // grid.cols
    pairs, own = rows * cols, sequences // grid.rows
    tile, cells = pairs * c * BF16, own * cols
    width = config.pairformer.pairwise_num_heads * config.pairformer.pairwise_head_width
    scores = n // grid.cp_size * config.pairformer.pairwise_num_heads * n * n

    product = 2 * n**3 * c / grid.cp_size
    local = _linear(pairs, c, 4 * c) + _linear(pairs, c, 2 * c)
    multiplication = (OpWork(product + local, 0, 13.5 * tile), OpWork(2 * product + 3 * local, 0, 18.5 * tile))

    score = 2 * scores * config.pairformer.pairwise_head_width
    local = _linear(pairs, c, 4 * width) + _linear(pairs, width, c)
    attention = (
        OpWork(2 * score + local, 0, 17 * tile, scores),
        OpWork(5 * score + 3 * local, 0, 26 * tile, scores),
    )
    wide = _linear(pairs, c, 4 * c)
    transition = (OpWork(3 * wide, 0, 2 * tile), OpWork(8 * wide, 0, 3 * tile))

    single = 3 * _linear(rows, s, s) + 2 * _linear(cols, s, s) + 4 * pairs * s + _linear(rows, s, s)
    bias = _linear(pairs, c, config.pairformer.num_heads)
    track = single + 3 * _linear(n, s, 4 * s)
    single_track = (OpWork(0, bias + track, 1.6 * tile), OpWork(0, 2 * (bias + track), 4 * tile))
    single_attention = (OpWork(0, bias + single, 1.6 * tile), OpWork(0, 2 * (bias + single), 4 * tile))

    a = sequences * n * OPM * BF16 * (1 / grid.rows + 1 / grid.cols)
    outer = 2 * rows * OPM * cols * OPM * sequences + _linear(pairs, OPM * OPM, c)
    outer_product = (OpWork(outer, 0, 2 * tile + a), OpWork(3 * outer, 0, 3 * tile + 2 * a))

    v = cells * PWA_HEADS * PWA
    averaged = 2 * PWA_HEADS * cols * n * own * PWA + 3 * _linear(cells, m, PWA_HEADS * PWA)
    exps = PWA_HEADS * cols * n
    averaging = (
        OpWork(averaged, 0, tile + 6 * v * BF16, exps),
        OpWork(3 * averaged, 0, 3 * tile + 12 * v * BF16, exps),
    )

    wide = _linear(cells, m, 4 * m)
    transition_m = (OpWork(3 * wide, 0, 2 * cells * m * BF16), OpWork(8 * wide, 0, 3 * cells * m * BF16))
    return {
        "triangle_multiplication": multiplication,
        "triangle_attention_start": attention,
        "triangle_attention_end": attention,
        "transition": transition,
        "attention_pair_bias": single_attention,
        "single track": single_track,
        "outer_product_mean": outer_product,
        "pair_weighted_averaging": averaging,
        "transition of m": transition_m,
    }


PAIR_STACK = ("triangle_multiplication", "triangle_multiplication", "triangle_attention_start")
PAIR_STACK += ("triangle_attention_end", "transition")
PARTS = {
    "pairformer_block": (*PAIR_STACK, "single track"),
    "msa_block": ("pair_weighted_averaging", "transition of m", "outer_product_mean", *PAIR_STACK),
}
"""Ops of a block."""


def least_seconds(op: str, of: dict[str, ForwardBackward], rates: Roofline) -> tuple[float, float]:
    """Floors of an op or block: of its forward pass, and of forward pass, recomputation and backward pass."""
    parts = [of[part] for part in PARTS.get(op, (op,))]
    forward, backward = (sum(passes[i].seconds(rates) for passes in parts) for i in range(2))
    return forward, 2 * forward + backward


def _linear(rows: float, c_in: int, c_out: int) -> float:
    return 2 * rows * c_in * c_out
