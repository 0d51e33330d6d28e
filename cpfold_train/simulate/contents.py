"""What is assumed where a step reads numbers of tensors that have no contents: proteins without ligands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.kernels.smooth_lddt import NEIGHBOURS


def found_in(mask: Tensor) -> Tensor:
    """What ``nonzero`` gives of a mask (n, m) of pairs of atoms: each of the n atoms has ``NEIGHBOURS`` near it."""
    found = mask.new_zeros(len(mask) * min(NEIGHBOURS, mask.shape[1]), dtype=torch.long)
    return found[:, None].expand(-1, 2)


class Contents(TorchDispatchMode):
    """Answers what is read without gradients: a float is the sum of a mask of all tokens, and a whole number the last
    chain. A mask that picks rows picks all, and one that looks for ligands finds none.

    Args:
        tokens, chains: of the sample.
    """

    def __init__(self, tokens: int, chains: int) -> None:
        super().__init__()
        self._tokens, self._last_chain = tokens, chains - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(self._tokens) if args[0].is_floating_point() else self._last_chain
        if func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            return args[0].clone()
        if func is torch.ops.aten.nonzero.default and args[0].dim() == 1:
            return args[0].new_empty(0, 1, dtype=torch.long)
        return func(*args, **(kwargs or {}))
