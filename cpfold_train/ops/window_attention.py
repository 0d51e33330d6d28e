"""Attention of atoms within windows, over shards of atoms.

AlphaFold 3, Algorithm 7 and ``boltz/model/modules/encodersv2.py``. The 32 atoms of window k attend to the 128 atoms
32 k - 48 ... 32 k + 79; those outside 0 ... A - 1 are zero and masked. Rank p has the windows of its shard of atoms and
needs 48 atoms on either side of it. They are its neighbours', or, where shards are smaller than that, also those of
ranks further on. Each rank sends about 96 atoms' keys and values forward and their gradients backward, whatever A is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpfold_train.dry_run import each_block
from cpfold_train.kernels.by_rows import rows_per_block
from cpfold_train.kernels.regions import region
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import ATOM_WINDOW, split
from cpfold_train.parallel.layouts import in_one_dim
from cpfold_train.parallel.redistribute import redistribute

OP = "window_attention"
WINDOW_KEYS = 128
"""Atoms that the atoms of a window attend to."""
HALO = (WINDOW_KEYS - ATOM_WINDOW) // 2
"""Atoms on either side of a window among them."""


def with_halo(x: Tensor, cp: ContextParallel) -> Tensor:
    """A shard of atoms (B, A/P, ...) with the ``HALO`` atoms before and after it, (B, A/P + 96, ...); zero where there
    are none."""
    n = x.shape[1] * cp.all.size
    shards = split(n, cp.all.size)
    wants = tuple((max(0, lo - HALO), min(n, hi + HALO)) for lo, hi in shards)
    x = redistribute(x, cp, cp.all, (1,), in_one_dim(shards), in_one_dim(wants), OP)
    (lo, hi), (first, last) = shards[cp.all.index], wants[cp.all.index]
    return pad(x, (0, 0) * (x.ndim - 2) + (first - lo + HALO, hi + HALO - last))


def windows_of_keys(x: Tensor, dim: int = 1) -> Tensor:
    """The keys of each window, (..., K, ..., 128), from atoms with their halo, (..., 32 K + 96, ...): a view."""
    return x.unfold(dim, WINDOW_KEYS, ATOM_WINDOW)


def attend_in_windows(atom_pad_mask: Tensor, cp: ContextParallel) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Attention over the windows of this rank's atoms.

    Args:
        atom_pad_mask: (B, A/P), 1 for real atoms.
        cp: the running grid.

    Returns:
        ``attend(q, k, v, bias)``, with q (already scaled), k and v (B M, A/P, h, d) of the rank's own atoms, M samples
        of each of the B complexes one after the other, and bias (B, A/32P, 32, 128, h), which all M have in common;
        returns (B M, A/P, h, d). ``o_i = sum_j softmax_j(q_i . k_j + bias_ij - 1e6 (1 - mask_j)) v_j``, in fp32 at
        least; the scores are never kept.
    """
    mask = with_halo(atom_pad_mask, cp)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return _WindowAttention.apply(q, with_halo(torch.cat([k, v], -1), cp), bias, mask)

    return attend


@region
def _attend(q: Tensor, kv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Some windows: q (B M, 32 w, h, d), kv (B M, 32 w + 96, h, 2d), bias (B, w, 32, 128, h), mask (B, 32 w + 96)."""
    batch, dtype = bias.shape[0], q.dtype
    acc_dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(acc_dtype).unflatten(0, (batch, -1)).unflatten(2, (-1, ATOM_WINDOW)).transpose(3, 4)
        keys, values = windows_of_keys(kv.to(acc_dtype).unflatten(0, (batch, -1)), 2).chunk(2, 4)
        masked = (windows_of_keys(mask.to(acc_dtype)) - 1) * 1e6
        scores = queries @ keys + bias.to(acc_dtype).permute(0, 1, 4, 2, 3)[:, None] + masked[:, None, :, None, None]
        out = scores.softmax(-1) @ values.mT
    return out.transpose(3, 4).flatten(2, 3).flatten(0, 1).to(dtype)


class _WindowAttention(torch.autograd.Function):
    """:func:`_attend`, a few windows at a time, forward and again in the backward pass."""

    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(q, kv, bias, mask)
        out = torch.empty_like(q)
        for windows, atoms, keys in _blocks(q, bias):
            out[:, atoms] = _attend(q[:, atoms], kv[:, keys], bias[:, windows], mask[:, keys])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, kv, bias, mask = ctx.saved_tensors
        dq, dkv, dbias = torch.empty_like(q), torch.zeros_like(kv), torch.empty_like(bias)
        for windows, atoms, keys in _blocks(q, bias):
            args = [x.detach().requires_grad_() for x in (q[:, atoms], kv[:, keys], bias[:, windows])]
            with torch.enable_grad():
                out = _attend(*args, mask[:, keys])
            found = torch.autograd.grad(out, args, grad[:, atoms])
            dq[:, atoms], dbias[:, windows] = found[0], found[2]
            # Neighbouring blocks have keys in common.
            dkv[:, keys] += found[1]
        return dq, dkv, dbias, None


def _blocks(q: Tensor, bias: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Windows, their atoms, and their keys among the atoms with halo, to take at a time."""
    score_bytes = q.shape[0] * ATOM_WINDOW * WINDOW_KEYS * q.shape[2] * max(4, q.element_size())
    windows = rows_per_block(score_bytes, q.device)
    blocks = []
    for first in range(0, bias.shape[1], windows):
        last = min(first + windows, bias.shape[1])
        start, stop = first * ATOM_WINDOW, last * ATOM_WINDOW
        blocks.append((slice(first, last), slice(start, stop), slice(start, stop + 2 * HALO)))
    return each_block(blocks, lambda block: block[0].stop - block[0].start)
