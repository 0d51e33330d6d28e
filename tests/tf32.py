"""TF32 without a GPU: matrix products whose factors are rounded as a GPU's matrix units round them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.ops import points

DROPPED = 13
"""Of the 23 bits of a number in fp32 those that TF32 has not."""
FACTORS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
"""Where each product has its factors; what is added to it is not rounded. Layers come down to these."""


def rounded(x: Tensor, nearest: bool = True) -> Tensor:
    """To ten explicit bits: to the nearest, ties away from zero, as cuBLAS converts; or towards zero, as matrix units
    do that are given fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (DROPPED - 1)) if nearest else bits) & -(1 << DROPPED)).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Rounds the factors of every product in fp32 that runs inside, those of the backward pass as well.

    Attributes:
        products: how many there were.
    """

    def __init__(self, nearest: bool = True) -> None:
        super().__init__()
        self.products, self._nearest = 0, nearest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        # What runs inside another operator would not be seen.
        assert name.startswith(("aten::", "prim::", "c10d::", "_c10d_functional::")), name
        assert "scaled_dot_product" not in name and "linear" not in name.replace("linalg", ""), name
        args = list(args)
        for i in FACTORS.get(name, ()):
            if args[i].dtype == torch.float32:
                args[i] = rounded(args[i], self._nearest)
                self.products += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def points_as_on_gpus() -> Iterator[None]:
    """Inside, products of positions and noise levels are calculated component by component, as on GPUs."""
    before, points.products_are_exact = points.products_are_exact, lambda x: False
    try:
        yield
    finally:
        points.products_are_exact = before
