"""Triton's kernel of :mod:`cpfold_train.kernels.smooth_lddt`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpfold_train.kernels.triton.launches import Launch

ROWS, COLUMNS, WARPS = 16, 32, 4


def sums_and_gradient(pred: Tensor, truth: Tensor, first: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (S,), numbers of pairs (B,) and gradient (S, A, 3), of pred (S, A, 3) and truth (B, A, 4)."""
    samples, atoms, _ = pred.shape
    blocks = triton.cdiv(atoms, ROWS)
    sums, counts, grad = pred.new_empty(samples, blocks), pred.new_empty(samples, blocks), torch.empty_like(pred)
    copies = samples // len(truth)
    _sums[blocks, samples](
        pred, truth, sums, counts, grad, atoms, copies, first, step, ROWS, COLUMNS, num_warps=WARPS, num_stages=1
    )
    return sums.sum(1), counts[::copies].sum(1), grad


@triton.jit
def _place(ptr, atom, A, WIDTH: tl.constexpr):
    """x, y and z of some atoms; WIDTH numbers are kept of each."""
    at, live = ptr + atom * WIDTH, atom < A
    x = tl.load(at, mask=live, other=0.0)
    y = tl.load(at + 1, mask=live, other=0.0)
    return x, y, tl.load(at + 2, mask=live, other=0.0)


@triton.jit
def _score(x, y, z, distance):
    """Of predicted differences and true distances: score, and the factor of the differences in its gradient."""
    length = tl.sqrt(x * x + y * y + z * z)
    error = length - distance
    size = tl.abs(error)
    a, b, c, d = tl.sigmoid(0.5 - size), tl.sigmoid(1.0 - size), tl.sigmoid(2.0 - size), tl.sigmoid(4.0 - size)
    slope = a * (a - 1) + b * (b - 1) + c * (c - 1) + d * (d - 1)
    sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    return (a + b + c + d) / 4, slope * sign / (4 * length)


@triton.jit
def _sums(pred_ptr, truth_ptr, sums_ptr, counts_ptr, grad_ptr, A, COPIES, FIRST, STEP,
          BI: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """One program: BI atoms of a sample against all others, BJ at a time."""
    block, sample = tl.program_id(0), tl.program_id(1)
    i = block * BI + tl.arange(0, BI)
    true_ptr = truth_ptr + (sample // COPIES).to(tl.int64) * A * 4
    own_ptr = pred_ptr + sample.to(tl.int64) * A * 3
    tx, ty, tz = _place(true_ptr, i, A, 4)
    px, py, pz = _place(own_ptr, i, A, 3)
    reach_i = tl.load(true_ptr + i * 4 + 3, mask=i < A, other=0.0)
    score, count = tl.zeros([BI], tl.float32), tl.zeros([BI], tl.float32)
    gx, gy, gz = tl.zeros([BI], tl.float32), tl.zeros([BI], tl.float32), tl.zeros([BI], tl.float32)
    for start in range(0, A, BJ):
        j = start + tl.arange(0, BJ)
        ux, uy, uz = _place(true_ptr, j, A, 4)
        reach_j = tl.load(true_ptr + j * 4 + 3, mask=j < A, other=0.0)
        dx, dy, dz = tx[:, None] - ux[None, :], ty[:, None] - uy[None, :], tz[:, None] - uz[None, :]
        square = dx * dx + dy * dy + dz * dz
        both = (reach_i > 0)[:, None] & (reach_j > 0)[None, :] & (i[:, None] != j[None, :])
        there = both & (square < (reach_i * reach_i)[:, None]) & (i % STEP == FIRST)[:, None]
        back = both & (square < (reach_j * reach_j)[None, :]) & (j % STEP == FIRST)[None, :]
        if tl.sum((there | back).to(tl.int32)) > 0:
            distance = tl.sqrt(square)
            qx, qy, qz = _place(own_ptr, j, A, 3)
            dx, dy, dz = px[:, None] - qx[None, :], py[:, None] - qy[None, :], pz[:, None] - qz[None, :]
            # The pair (i, j), and the pair (j, i): to each component 1e-6 is added.
            scored, factor = _score(dx + 1e-6, dy + 1e-6, dz + 1e-6, distance)
            score += tl.sum(tl.where(there, scored, 0.0), 1)
            count += tl.sum(there.to(tl.float32), 1)
            forth = tl.where(there, factor, 0.0)
            _, factor = _score(1e-6 - dx, 1e-6 - dy, 1e-6 - dz, distance)
            factor = tl.where(back, factor, 0.0)
            gx += tl.sum(forth * (dx + 1e-6) - factor * (1e-6 - dx), 1)
            gy += tl.sum(forth * (dy + 1e-6) - factor * (1e-6 - dy), 1)
            gz += tl.sum(forth * (dz + 1e-6) - factor * (1e-6 - dz), 1)
    at = grad_ptr + sample.to(tl.int64) * A * 3 + i * 3
    tl.store(at, gx, mask=i < A)
    tl.store(at + 1, gy, mask=i < A)
    tl.store(at + 2, gz, mask=i < A)
    place = sample * tl.num_programs(0) + block
    tl.store(sums_ptr + place, tl.sum(score))
    tl.store(counts_ptr + place, tl.sum(count))


LAUNCHES = [
    Launch(
        "smooth lDDT",
        _sums,
        dict.fromkeys(["pred_ptr", "truth_ptr", "sums_ptr", "counts_ptr", "grad_ptr"], "*fp32")
        | dict.fromkeys(["A", "COPIES", "FIRST", "STEP"], "i32"),
        {"BI": ROWS, "BJ": COLUMNS},
        WARPS,
        1,
    )
]
