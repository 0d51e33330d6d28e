"""How far each kernel is from fp64, in each precision."""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.gpu_check.blocks import BLOCKS, autocast, block, forward, inputs
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import PRECISIONS, Scope
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.trunk_cases import TRUNK
from cpfold_train.testing.parity import relative_error

LIMITS = {"32-true": 1e-4, "bf16-mixed": 3e-2, "bf16-true": 3e-2}
"""Largest error of an output or a gradient, by precision."""
WORSE = 2.0
"""How many times the error of torch's kernels that of others may be."""


def measure_errors(record: Record, scope: Scope) -> None:
    """Errors of a block's outputs and gradients in each precision, with each of the kernels."""
    cp = ContextParallel(Grid(), scope.device)
    for op in BLOCKS:
        record.attempt(op, _block, record, scope, cp, op)


def _block(record: Record, scope: Scope, cp: ContextParallel, op: str) -> None:
    exact = _results(scope, cp, op, "torch", None)
    for precision in PRECISIONS:
        limits = dict.fromkeys(exact, LIMITS[precision])
        # Torch's own come first: the others are compared with them.
        for kernels in reversed(scope.backends()):
            if kernels == "cuequivariance" and precision == "32-true":
                continue
            name = f"{op}, {precision}, {kernels}"
            record.attempt(name, _compare, record, scope, cp, (op, kernels, precision), exact, limits)


def _compare(
    record: Record,
    scope: Scope,
    cp: ContextParallel,
    which: tuple[str, str, str],
    exact: dict[str, Tensor],
    limits: dict[str, float],
) -> None:
    op, kernels, precision = which
    name = f"{op}, {precision}, {kernels}"
    found = _results(scope, cp, op, kernels, precision)
    errors = {what: relative_error(x, exact[what]) for what, x in found.items()}
    record.add(name, **errors)
    for what, error in errors.items():
        if not error <= limits[what]:
            record.fail(name, f"the error of {what} is {error:.1e}, more than {limits[what]:.0e}")
        if kernels == "torch":
            limits[what] = max(WORSE * error, LIMITS[precision] / 10)


def _results(scope: Scope, cp: ContextParallel, op: str, kernels: str, precision: str | None) -> dict[str, Tensor]:
    """Outputs and gradients of a block; ``precision`` None is fp64."""
    cp.kernels = kernels
    module = block(op, scope)
    # All see what z, s and m are in bf16, so that errors are those of the arithmetic.
    x = inputs(op, scope, scope.exact_tokens, cp, precision or "32-true")
    for name in TRUNK[op].inputs:
        x[name] = x[name].detach().bfloat16().to(x[name].dtype).requires_grad_()
    if precision is None:
        module.double()
        x = {name: value.double() if value.dtype == torch.float32 else value for name, value in x.items()}
        x |= {name: x[name].detach().requires_grad_() for name in TRUNK[op].inputs}
    with autocast(scope, precision or "32-true"):
        out = forward(op, module, x, cp)
    generator = torch.Generator().manual_seed(1)
    # The same for all precisions.
    grads = [torch.randn(part.shape, generator=generator).to(part) for part in out]
    torch.autograd.backward(out, grads)
    results = {f"output {i}": part.detach() for i, part in enumerate(out)}
    results |= {f"gradient of {name}": x[name].grad for name in TRUNK[op].inputs}
    weights = torch.cat([p.grad.flatten().double() for p in module.parameters()])
    return {what: value.double().cpu() for what, value in results.items()} | {"gradient of weights": weights.cpu()}
