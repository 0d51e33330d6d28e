"""A Pairformer and an MSA block: their inputs, and how they are called in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from cpfold_train.gpu_check.scope import PRECISIONS, Scope
from cpfold_train.ops.recompute import recompute
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.simulate.bench.case import Inputs
from cpfold_train.simulate.bench.inputs import make_features, make_inputs, randomise
from cpfold_train.simulate.bench.trunk_cases import TRUNK

BLOCKS = ("pairformer_block", "msa_block")


def block(op: str, scope: Scope) -> nn.Module:
    """An op of the trunk with random weights in fp32, on the device."""
    module = TRUNK[op].build(scope.model)
    randomise(module)
    return module.to(scope.device)


def inputs(op: str, scope: Scope, tokens: int, cp: ContextParallel, precision: str) -> Inputs:
    """Random ones of this rank, with gradients; s is in fp32 in every precision."""
    device, sizes = torch.device(scope.device), scope.sizes(tokens, cp.grid)
    torch.manual_seed(0)
    made = make_inputs(TRUNK[op].inputs, scope.model, sizes, cp.grid, PRECISIONS[precision], device)
    return make_features(TRUNK[op].inputs, sizes, cp.grid, device) | made


def autocast(scope: Scope, precision: str) -> AbstractContextManager:
    """Products in bf16, with the model's islands of fp32, as in training."""
    return torch.autocast(scope.device, torch.bfloat16, enabled=precision != "32-true")


def forward(op: str, module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor, ...]:
    """Outputs of an op."""
    return TRUNK[op].call(module, x, cp)


def trained(op: str, module: nn.Module, x: Inputs, cp: ContextParallel, mixed: AbstractContextManager) -> Callable:
    """Forward pass, recomputation and backward pass of an op as a call, as of a block that is recomputed."""
    names = [name for name in TRUNK[op].inputs if x[name].requires_grad]

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        return forward(op, module, x | dict(zip(names, tensors)), cp)

    def step() -> None:
        with mixed:
            out = recompute(again, *(x[name] for name in names))
        torch.autograd.backward(out, [torch.ones_like(part) for part in out])
        forget([*(x[name] for name in names), *module.parameters()])

    return step


def forget(tensors: Sequence[Tensor]) -> None:
    """Take gradients away, so that the next ones are not added to them."""
    for x in tensors:
        x.grad = None
