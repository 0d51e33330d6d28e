"""Sums of the smooth lDDT over all pairs of near atoms, and their gradient, in one kernel.

The torch form (:mod:`cpfold_train.losses.smooth_lddt`) lists the pairs that are near in the truth, block by block of
rows. How many these are a GPU's host must wait for, and gradients are added up in no fixed order. The kernel lists
nothing: a program has 16 atoms of one sample and goes through all others, 32 at a time. Whether any is near costs 16 x
32 distances; only where one is are predictions read and scores taken, in both directions, so that a program finds the
whole gradient of its atoms and no two add to one number.

Nothing is read or written but coordinates, their gradient and a few sums, (24 S + 16 B) A bytes. Operations on A atoms
and S samples: about 14 S A^2 for distances, on every rank, since any atom may be a partner of a rank's rows; and 8
exponentials for each pair in a tile of which some pair is near, about 4 times as many as are near. For 25,000 atoms and
16 samples that is 2 ms of an H100's 67 TFLOP/s outside its matrix units, and 3 ms of exponentials, roots and quotients
(calculated, not measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.kernels.work import Work, work

NEIGHBOURS = 512
"""Atoms within 15 Angstrom of one inside a protein, at most: what is assumed where there are no coordinates to see."""
_IN_TILES = 4
"""Pairs in tiles of which some pair is near, for each pair that is."""


@torch.library.custom_op("cpfold::smooth_lddt", mutates_args=())
def smooth_lddt(pred: Tensor, truth: Tensor, first: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over ordered pairs (i, j) whose true distance is below i's reach, i being ``first``, ``first + step``, ...

    Args:
        pred: (B*M, A, 3) float32, in Angstrom.
        truth: (B, A, 4) float32, coordinates and reach; an atom with none is in no pair.
        first, step: which rows are this rank's.

    Returns:
        Sums of scores (B*M,), with a gradient; numbers of pairs (B,); and the gradient of the sums (B*M, A, 3).
    """
    from cpfold_train.kernels.triton import smooth_lddt as kernels

    return kernels.sums_and_gradient(pred.contiguous(), truth.contiguous(), first, step)


@smooth_lddt.register_fake
def _(pred: Tensor, truth: Tensor, first: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return pred.new_empty(len(pred)), pred.new_empty(len(truth)), pred.new_empty(pred.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, pairs, grad = output
    ctx.mark_non_differentiable(pairs, grad)
    ctx.save_for_backward(grad)


def _gradient(ctx, grad_sums: Tensor, *_) -> tuple[Tensor, None, None, None]:
    (grad,) = ctx.saved_tensors
    return grad * grad_sums[:, None, None], None, None, None


smooth_lddt.register_autograd(_gradient, setup_context=_keep)


@work("smooth_lddt")
def _(pred: Tensor, truth: Tensor, first: int, step: int, out: tuple[Tensor, Tensor, Tensor]) -> Work:
    # Two directions, four thresholds. The kernel, and the sums over its programs.
    near = pred.shape[0] * pred.shape[1] * min(NEIGHBOURS, pred.shape[1])
    return Work(0, 8 * _IN_TILES * near, 2 * pred.nbytes + truth.nbytes, 3)
