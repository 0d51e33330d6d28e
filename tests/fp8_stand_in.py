"""A stand-in for NVIDIA's Transformer Engine, which runs on GPUs only: plain torch that insists on the package's rules.

What it checks is how the package is called. It says nothing of fp8 itself.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from math import prod
from types import ModuleType

import torch
from torch import Tensor, nn

calls: list[tuple[tuple[int, ...], bool]] = []
"""Shape of the weight of each call, and whether it was for a graph, as in the backward pass of a block alone."""
active: list[object] = []
"""Recipes of the regions entered and not left."""


class Float8CurrentScaling:
    """Scales by the present values."""


@contextmanager
def autocast(enabled: bool, recipe: object):
    assert enabled
    active.append(recipe)
    try:
        yield
    finally:
        active.pop()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, grad: Tensor):
        check_shape(grad)
        assert isinstance(active[-1], Float8CurrentScaling)
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x if ctx.needs_input_grad[1] else None


def check_shape(x: Tensor) -> None:
    assert prod(x.shape[:-1]) % 8 == 0 and x.shape[-1] % 16 == 0, f"fp8 does not multiply {tuple(x.shape)}"


class Linear(nn.Module):
    """As the package's: the weight is looked up by name, and computed with in autocast's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool, params_dtype: torch.dtype, device: str):
        super().__init__()
        empty = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **empty))
        self.bias = nn.Parameter(torch.empty(out_features, **empty)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(active[-1], Float8CurrentScaling)
        assert torch.is_autocast_enabled(x.device.type)
        device = next(self.parameters()).device
        assert device == x.device
        dtype = torch.get_autocast_dtype(x.device.type)
        check_shape(x)
        check_shape(self.weight)
        calls.append((tuple(self.weight.shape), torch.is_grad_enabled()))
        with torch.autocast(x.device.type, enabled=False):
            out = _Product.apply(x.to(dtype), self.weight.to(dtype))
            return out if self.bias is None else out + self.bias.to(dtype)


def install(modules: dict[str, ModuleType] = sys.modules) -> None:
    """Make it importable under the package's names."""
    package, pytorch, common, recipe = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".common", ".common.recipe")
    )
    pytorch.Linear, pytorch.autocast, recipe.Float8CurrentScaling = Linear, autocast, Float8CurrentScaling
    package.pytorch, package.common, common.recipe = pytorch, common, recipe
    for module in (package, pytorch, common, recipe):
        modules[module.__name__] = module


def main() -> int | None:
    """The command line, with the stand-in. What it saw, and in what z was held, is printed."""
    from cpfold_train.cli import train as entry
    from cpfold_train.config import check_precision
    from cpfold_train.model.trunk import Trunk

    forward, held = Trunk.forward, set()

    def watched(self, *args):
        out = forward(self, *args)
        held.add(out["z"].dtype)
        return out

    install()
    Trunk.forward = watched
    check_precision._require_fp8 = lambda accelerator: None
    try:
        return entry.main()
    finally:
        print(f"stand-in: {len(calls)} calls, {sum(graph for _, graph in calls)} for a graph; z in {held}")
