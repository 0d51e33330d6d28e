"""The operators of fused attention: what they take and give, compute and move. Triton's kernels are behind them.

``cpfold::attention`` is attention to some of the keys or all of them, with the log-sum-exp, and with a gate if one is
given. Its backward pass is two operators: ``cpfold::attention_delta`` goes back through the gate, and
``cpfold::attention_backward`` through the softmax over all keys, of which those at hand may be a part. Gradients are
written where the caller wants them, so that queries and gate, keys and values can be parts of one tensor.

Queries, keys, values, gate and their gradients may have any strides; the last dim should be contiguous, or they are
copied.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from cpfold_train.kernels.work import NAMESPACE, Work, work

WIDTHS = (16, 64)
"""Least and largest width of the tiles that a head is padded to, a power of two."""
BIAS_BYTES = 1 << 24
"""Bias of the blocks that run before others do: it, and keys and values of the rows at work, are to fit L2 (50 MB on
H100)."""
JOINED_PROGRAMS = 264
"""Rows times heads from which one kernel gives the gradients of both queries and keys: two programs for each
multiprocessor of an H100, which holds one at a time."""
BIAS_TILES = 16
"""Programs that share a block of queries, or of keys, while they own tiles of the gradient of the bias."""


class Blocks(NamedTuple):
    """Queries, keys and rows of a program, and how it is launched. Kernels that go over all rows have one at a time."""

    m: int
    n: int
    rows: int
    warps: int
    stages: int


class Tiling(NamedTuple):
    """Of the forward kernel and of those for the gradients of keys and values, of queries, and of the bias; where there
    is one for both keys and queries, its own."""

    forward: Blocks
    keys: Blocks
    queries: Blocks
    bias: Blocks
    joined: Blocks | None = None


AMPERE, HOPPER, BLACKWELL = 8, 9, 10
"""Major compute capabilities whose matrix units want tiles of their own; others take Ampere's."""
NARROW = {
    AMPERE: Tiling(
        Blocks(128, 64, 1, 4, 2), Blocks(32, 128, 2, 8, 2), Blocks(128, 32, 2, 8, 2), Blocks(128, 128, 1, 8, 2)
    ),
    HOPPER: Tiling(
        Blocks(128, 64, 2, 4, 2),
        Blocks(64, 128, 2, 8, 2),
        Blocks(256, 32, 2, 8, 2),
        Blocks(128, 128, 1, 8, 2),
        joined=Blocks(64, 256, 1, 8, 1),
    ),
    BLACKWELL: Tiling(
        Blocks(128, 64, 1, 4, 2), Blocks(64, 128, 2, 8, 2), Blocks(256, 32, 2, 8, 2), Blocks(128, 128, 1, 8, 2)
    ),
}
"""Of heads up to a width of 32, in half precision."""
WIDE = {
    AMPERE: Tiling(Blocks(64, 64, 1, 4, 2), Blocks(32, 64, 1, 4, 2), Blocks(64, 32, 1, 4, 2), Blocks(128, 64, 1, 8, 2)),
    HOPPER: Tiling(
        Blocks(128, 64, 1, 4, 2), Blocks(64, 128, 1, 8, 2), Blocks(128, 64, 2, 8, 2), Blocks(128, 128, 1, 8, 2)
    ),
    BLACKWELL: Tiling(
        Blocks(128, 64, 1, 4, 2), Blocks(64, 64, 1, 4, 2), Blocks(64, 64, 1, 4, 2), Blocks(128, 64, 1, 8, 2)
    ),
}
"""Of wider heads."""
FULL = Tiling(Blocks(32, 32, 1, 4, 1), Blocks(16, 16, 1, 8, 1), Blocks(32, 32, 1, 4, 1), Blocks(32, 32, 1, 4, 1))
"""In fp32, whose exact products are not for matrix units, and in TF32 before Hopper."""
TF32 = Tiling(Blocks(64, 64, 1, 4, 2), Blocks(32, 64, 1, 4, 2), Blocks(64, 64, 1, 4, 2), Blocks(64, 32, 1, 4, 2))


def padded(width: int) -> int:
    """The power of two to which the kernels pad a head."""
    return max(WIDTHS[0], 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Of products of fp32: as torch's own, exact or in TF32, whichever ``torch.set_float32_matmul_precision`` says."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def tiling(q: Tensor) -> Tiling:
    """Tiles for queries (B, r, h, M, d) like ``q``: by dtype, width and GPU; without a GPU, Hopper's."""
    there = q.device.type == "cuda" and torch.cuda.is_available()
    return tiling_of(q.dtype, q.shape[4], torch.cuda.get_device_capability(q.device)[0] if there else HOPPER)


def tiling_of(dtype: torch.dtype, width: int, major: int) -> Tiling:
    """Tiles by dtype, width of the heads and major compute capability."""
    if dtype == torch.float32:
        return TF32 if precision(dtype) == "tf32" and major in (HOPPER, BLACKWELL) else FULL
    tilings = NARROW if padded(width) <= 32 else WIDE
    return tilings.get(major, tilings[AMPERE])


def bias_groups(bias: Tensor, along: int, size: int) -> int:
    """In how many groups blocks of ``size`` along dim ``along`` of the bias (B, h, M, N) run, each for all rows."""
    return ceil(bias.shape[2] * bias.shape[3] * bias.element_size() / max(BIAS_BYTES, _strip(bias, along, size)))


def joined_blocks(q: Tensor) -> Blocks | None:
    """Tile of the kernel for the gradients of both queries and keys, or None where two kernels give them."""
    enough = q.shape[0] * q.shape[1] * q.shape[2] >= JOINED_PROGRAMS
    return tiling(q).joined if enough else None


def supports(dtype: torch.dtype, width: int) -> bool:
    """Whether there are kernels; everything else, such as fp64, takes the torch form."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and padded(width) <= WIDTHS[1]


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sigmoid(gate_i) softmax_j(q_i . k_j + bias_ij) v_j`` for each row and head, and the log-sum-exp of the scores.

    Args:
        q: (B, r, h, M, d) queries, already scaled.
        k, v: (B, r, h, N, d).
        bias: (B, h, M, N), the same for all r rows; very negative where a key is masked. Queries all of whose keys are
            masked (scores below -1e7) get zeros.
        gate: (B, r, h, M, d), or None for no gate.

    Returns:
        (B, r, h, M, d) in the dtype of ``q``, in memory (B, r, M, h, d), and (B, r, h, M) in fp32.
    """
    from cpfold_train.kernels.triton import attention as kernels

    out, lse = _results(q)
    kernels.launch(*_dense(q, k, v, bias), gate, out, lse)
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return _results(q)


@work("attention")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None, results: tuple[Tensor, Tensor]) -> Work:
    """Two products and one exponential a score. The bias is read once, keys and values once a group of blocks."""
    scores, blocks = _scores(q, k), tiling(q).forward
    moved = _bytes(q, bias, gate, *results) + bias_groups(bias, 2, blocks.m) * _bytes(k, v)
    l2 = scores * (bias.element_size() / blocks.rows + _pair(k) / blocks.m)
    return Work(4 * scores * q.shape[4], scores, moved, l2_bytes=l2)


@torch.library.custom_op(f"{NAMESPACE}::attention_delta", mutates_args=("dgate",))
def attention_delta(grad: Tensor, out: Tensor, gate: Tensor | None, dgate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Product of a result and its gradient, and the gradient before the gate.

    Args:
        grad: (B, r, h, M, d) gradient of ``out``.
        out: (B, r, h, M, d), gated if there is a gate.
        gate: (B, r, h, M, d), or None.
        dgate: (B, r, h, M, d), where the gate's gradient is written.

    Returns:
        (B, r, h, M) in fp32, and (B, r, h, M, d), empty without a gate.
    """
    from cpfold_train.kernels.triton import attention_backward as kernels

    delta, before = _start(grad, gate)
    kernels.launch_delta(*_dense(grad, out), gate, dgate, delta, before)
    return delta, before


@attention_delta.register_fake
def _(grad: Tensor, out: Tensor, gate: Tensor | None, dgate: Tensor | None) -> tuple[Tensor, Tensor]:
    return _start(grad, gate)


@work("attention_delta")
def _(grad: Tensor, out: Tensor, gate: Tensor | None, dgate: Tensor | None, results: tuple[Tensor, Tensor]) -> Work:
    return Work(0.0, 0.0 if gate is None else gate.numel(), _bytes(grad, out, gate, dgate, *results))


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=("dq", "dk", "dv", "dbias"))
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    add: bool,
) -> None:
    """What these keys make of the gradients.

    Args:
        q, k, v, bias: as for :func:`attention`.
        grad: (B, r, h, M, d) gradient of the result before the gate.
        lse: (B, r, h, M) log-sum-exp over all keys, not only these.
        delta: (B, r, h, M) product of ``grad`` and the result, over all keys.
        dq: (B, r, h, M, d), overwritten, or added to if ``add``, in fp32 then.
        dk, dv: (B, r, h, N, d), overwritten.
        dbias: (B, h, M, N) in fp32, added to; best contiguous.
    """
    from cpfold_train.kernels.triton import attention_backward as kernels

    kernels.launch(*_dense(q, k, v, bias, grad), lse, delta, dq, dk, dv, dbias, add)


@attention_backward.register_fake
def _(q, k, v, bias, grad, lse, delta, dq, dk, dv, dbias, add) -> None:
    return None


@work("attention_backward")
def _(q, k, v, bias, grad, lse, delta, dq, dk, dv, dbias, add, result) -> list[Work]:
    """Each kernel computes the weights again: an exponential and two products a score, beside those of the gradients.

    To the first the copies of ``lse`` in base 2 and of the bias are counted, to the last the largest bias of each
    query. The kernel for the bias reads the rest as often as there are groups of tiles beside each other.
    """
    scores, sizes, d = _scores(q, k), tiling(q), q.shape[4]
    of_queries, of_keys, logs = _bytes(q, grad, lse, delta), _bytes(k, v), lse.element_size() + delta.element_size()
    copied = 2 * _bytes(bias) + 2 * _bytes(lse)
    shared = bias.element_size()

    if blocks := joined_blocks(q):
        # Queries, their gradient and what is added up for them come from memory once a block of keys.
        times, sums = ceil(k.shape[3] / blocks.n), 8 * q.numel()
        moved = (
            copied
            + _bytes(bias)
            + 2 * _bytes(delta)
            + of_keys
            + _bytes(dk, dv)
            + (1 + add) * _bytes(dq)
            + times * (of_queries + sums)
        )
        l2 = scores * (shared + (_pair(q) + logs + 8 * d) / blocks.n)
        both = [Work(10 * scores * d, scores, moved, 5, l2)]
    else:
        blocks = sizes.keys
        moved = copied + _bytes(bias, dk, dv) + of_keys + bias_groups(bias, 3, blocks.n) * of_queries
        l2 = scores * (shared / blocks.rows + (_pair(q) + logs) / blocks.n)
        both = [Work(8 * scores * d, scores, moved, 3, l2)]

        blocks = sizes.queries
        moved = _bytes(bias) + (1 + add) * _bytes(dq) + of_queries + bias_groups(bias, 2, blocks.m) * of_keys
        l2 = scores * (shared / blocks.rows + _pair(k) / blocks.m)
        both.append(Work(6 * scores * d, scores, moved, 1, l2))

    blocks = sizes.bias
    across, down = ceil(k.shape[3] / (BIAS_TILES * blocks.n)), ceil(q.shape[3] / (BIAS_TILES * blocks.m))
    moved = 2 * _bytes(bias) + 2 * _bytes(dbias) + across * of_queries + down * of_keys
    l2 = scores * ((_pair(q) + logs) / blocks.n + _pair(k) / blocks.m)
    return [*both, Work(4 * scores * d, scores, moved, 2, l2)]


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    # Laid out for the projection that follows, which wants tokens before heads.
    out = torch.empty_like(q.transpose(2, 3), memory_format=torch.contiguous_format).transpose(2, 3)
    return out, q.new_empty(q.shape[:4], dtype=torch.float32)


def _start(grad: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    before = grad.new_empty(0) if gate is None else _results(grad)[0]
    return grad.new_empty(grad.shape[:4], dtype=torch.float32), before


def _dense(*tensors: Tensor) -> list[Tensor]:
    """With contiguous last dims, which they have but for gradients of plain sums, and bias from elsewhere."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _scores(q: Tensor, k: Tensor) -> int:
    return q[..., 0].numel() * k.shape[3]


def _pair(x: Tensor) -> int:
    """Bytes of a key and a value, or of a query and its gradient."""
    return 2 * x.shape[4] * x.element_size()


def _strip(bias: Tensor, along: int, size: int) -> int:
    """Bytes of the bias of a head and of a block of queries (dim 2) or keys (dim 3)."""
    return size * bias.shape[5 - along] * bias.element_size()


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
