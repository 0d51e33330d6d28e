"""Between atoms and tokens: which tokens a rank's atoms belong to, and what travels from the one to the other.

Rank p has the p-th of P shards of the tokens and the p-th of P shards of the atoms, and tokens have different numbers
of atoms. So what a rank has of the one is not quite what belongs to what it has of the other. All ranks know
``token_atom_start`` (B, N + 1), and so each knows the *span* of tokens that the atoms of each rank belong to: nothing
else is sent, and no rank holds all tokens of all diffusion samples. A span covers all B complexes of a batch.

``token_atom_start`` is on the host, so that none of these functions waits for a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from cpfold_train.kernels.by_rows import rows_per_block
from cpfold_train.ops.recompute import recompute
from cpfold_train.ops.window_attention import HALO, windows_of_keys, with_halo
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import ATOM_WINDOW, Interval, split
from cpfold_train.parallel.layouts import in_one_dim, tiles
from cpfold_train.parallel.redistribute import redistribute, sum_to_owners

OP = "atom_tokens"
Feats = dict[str, Tensor | np.ndarray]


def token_spans(feats: Feats, cp: ContextParallel, halo: int = 0) -> tuple[Interval, ...]:
    """Tokens that the atoms of each rank's shard, and ``halo`` atoms on either side of it, belong to.

    Args:
        feats: ``token_atom_start`` (B, N + 1), an array: in each complex token i owns the atoms from its i-th entry to
            the next, padded tokens none; ``atom_to_token`` (B, A/P).
        cp: the running grid.
        halo: atoms before and after the shard.

    Returns:
        For each rank the first and one past the last token, at least one; on one rank all tokens.
    """
    starts = feats["token_atom_start"]
    n = starts.shape[1] - 1
    if cp.all.size == 1:
        return ((0, n),)
    shards = np.array(split(feats["atom_to_token"].shape[1] * cp.all.size, cp.all.size))
    first, stop = np.full(len(shards), n), np.zeros(len(shards), dtype=int)
    for start in starts:
        lo = np.searchsorted(start[1:], shards[:, 0] - halo, side="right")
        hi = np.searchsorted(start[:-1], np.minimum(shards[:, 1] + halo, start[-1]), side="left")
        some = lo < hi
        first[some], stop[some] = np.minimum(first, lo)[some], np.maximum(stop, hi)[some]
    first[stop == 0], stop[stop == 0] = 0, 1
    return tuple(zip(first.tolist(), stop.tolist()))


def tokens_to_atoms(x: Tensor, feats: Feats, cp: ContextParallel) -> Tensor:
    """To each atom what its token has.

    Args:
        x: this rank's shard of tokens (B M, N/P, c), M samples of each complex.
        feats: ``token_atom_start`` (B, N + 1), and ``atom_to_token`` (B, A/P) of the rank's atoms.
        cp: the running grid.

    Returns:
        (B M, A/P, c); some token's for padded atoms.
    """
    spans = token_spans(feats, cp)
    x = redistribute(x, cp, cp.all, (1,), in_one_dim(_token_shards(feats, cp)), in_one_dim(spans), OP)
    return pick_tokens(x, spans[cp.all.index][0], feats)


def pick_tokens(x: Tensor, first: int, feats: Feats) -> Tensor:
    """As :func:`tokens_to_atoms`, from tokens ``first``, ``first + 1``, ... (B M, n, c) among which all are that the
    rank's atoms belong to. Local."""
    position = _positions(feats["atom_to_token"], first, x.shape[1], x.shape[0])
    return x.flatten(0, 1).index_select(0, position.flatten()).unflatten(0, position.shape)


def atoms_to_tokens(x: Tensor, weight: Tensor, feats: Feats, cp: ContextParallel) -> Tensor:
    """Mean over each token's atoms of ``relu(W x_a)``, in fp32 at least.

    The mean is the sum divided by the number of atoms + 1e-6. The projected atoms, as wide as tokens and many times as
    many, are made a few at a time and again in the backward pass.

    Args:
        x: this rank's atoms (B M, A/P, c), M samples of each complex.
        weight: (c_token, c).
        feats: as for :func:`tokens_to_atoms`, and ``atom_pad_mask`` (B, A/P) and ``atoms_per_token`` (B, N).
        cp: the running grid.

    Returns:
        This rank's shard of tokens (B M, N/P, c_token); zero for tokens without atoms.
    """
    spans, shards = token_spans(feats, cp), _token_shards(feats, cp)
    (first, stop), (own, own_stop) = spans[cp.all.index], shards[cp.all.index]
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    copies = x.shape[0] // feats["atom_to_token"].shape[0]
    position = _positions(feats["atom_to_token"], first, stop - first, x.shape[0])
    # The projection has no bias: of what is zero, the projection is zero.
    x = x.to(acc_dtype) * feats["atom_pad_mask"].repeat_interleave(copies, 0)[..., None].to(acc_dtype)

    def project(block: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return linear(block, weight.to(acc_dtype)).relu().flatten(0, 1)

    sums = x.new_zeros(x.shape[0] * (stop - first), weight.shape[0])
    atoms = rows_per_block(x.shape[0] * weight.shape[0] * x.element_size(), x.device)
    for block, where in zip(x.split(atoms, 1), position.split(atoms, 1)):
        sums = sums.index_add_(0, where.flatten(), recompute(project, block, weight))
    sums = sums.unflatten(0, (x.shape[0], -1))
    sums = sum_to_owners(sums, cp, cp.all, (1,), in_one_dim(spans), in_one_dim(shards), OP)

    count = feats["atoms_per_token"][:, own:own_stop].to(acc_dtype).repeat_interleave(copies, 0)
    return sums / (count[..., None] + 1e-6)


def pairs_in_windows(z: Tensor, feats: Feats, cp: ContextParallel) -> Tensor:
    """To each pair of atoms in a window what their tokens' pair has.

    A rank receives the block of pairs between the tokens of its own atoms and the tokens of these and of their halo:
    about (N/P)² c elements.

    Args:
        z: tile (B, N/R, N/C, c), with few channels.
        feats: ``token_atom_start`` (B, N + 1) and ``atom_to_token`` (B, A/P).
        cp: the running grid.

    Returns:
        (B, A/32P, 32, 128, c), queries times keys; meaningless where one of the two is padded.
    """
    n = z.shape[1] * cp.grid.rows
    queries, keys = token_spans(feats, cp), token_spans(feats, cp, HALO)
    z = redistribute(z, cp, cp.all, (1, 2), tiles(cp.grid, n, n), tuple(zip(queries, keys)), OP)
    batch, rows, cols, _ = z.shape
    token = feats["atom_to_token"]
    i = _positions(token, queries[cp.all.index][0], rows, batch).unflatten(1, (-1, ATOM_WINDOW))
    j = (windows_of_keys(with_halo(token, cp)).long() - keys[cp.all.index][0]).clamp(0, cols - 1)
    position = i[..., None] * cols + j[:, :, None]
    return z.flatten(0, 2).index_select(0, position.flatten()).unflatten(0, position.shape)


def _positions(atom_to_token: Tensor, first: int, size: int, samples: int) -> Tensor:
    """Where each atom's token is, (samples, A/P), if ``size`` tokens from ``first`` on of every sample are in a row."""
    position = (atom_to_token.long() - first).clamp(0, size - 1)
    position = position.repeat_interleave(samples // position.shape[0], 0)
    return position + size * torch.arange(samples, device=position.device)[:, None]


def _token_shards(feats: Feats, cp: ContextParallel) -> tuple[Interval, ...]:
    return split(feats["token_atom_start"].shape[1] - 1, cp.all.size)
