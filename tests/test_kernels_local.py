"""Fused kernels of the pair stack's local parts, run by Triton's interpreter: forward and every gradient.

Each is compared with torch's form in fp64. Errors are relative, of norms: in fp32 those of its rounding; in bf16 a
few times that of rounding to 8 bits, in part because the interpreter cuts off where GPUs round.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cpfold_train.kernels.gated_output import gated_output
from cpfold_train.kernels.gated_projection import gated_projection
from cpfold_train.kernels.linear import linear_by
from cpfold_train.kernels.transition import transition
from cpfold_train.kernels.work import WORK
from cpfold_train.model.pair_stack import PairStack, TriangleMultiplicationIncoming, TriangleMultiplicationOutgoing
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import Draws
from tests.parity import cut, pad, randomise

pytest.importorskip("triton")

B, ROWS, COLS, C, HIDDEN = 2, 5, 13, 32, 128
"""65 pairs a sample: neither a multiple of a block nor of half of one."""
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Relative error of outputs and gradients, by dtype of the products."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(seed: int, channels: int = C) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * random(channels, seed=seed), 0.3 * random(channels, seed=seed + 1)


def weights(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed) / shape[1] ** 0.5


Z = 2 * random(B, ROWS, COLS, C, seed=1) + 0.5
MASK = (random(B, ROWS, COLS, seed=2) > -0.7).double()
FACTORS = (random(B, ROWS, seed=3) > -0.5).double() / 0.75
PROJECTION = [Z, MASK, *norm(4), weights(2 * C, C, seed=6), weights(2 * C, C, seed=7)]
OUTPUT = [3 * random(B, C, ROWS, COLS, seed=8), Z, *norm(9), *norm(11), *(weights(C, C, seed=i) for i in (13, 14))]
TRANSITION = [Z, *norm(15), *(weights(HIDDEN, C, seed=i) for i in (17, 18)), weights(C, HIDDEN, seed=19)]
CASES = {
    "gated projection": (gated_projection, PROJECTION),
    "gated output": (gated_output, OUTPUT),
    "gated output, residual": (partial(gated_output, residual=True), OUTPUT),
    "gated output, dropout": (partial(gated_output, residual=True, row_factors=FACTORS), OUTPUT),
    "transition": (transition, TRANSITION),
    "transition, residual": (partial(transition, residual=True), TRANSITION),
    "transition of 64 channels": (transition, [
        random(1, 3, 7, 64, seed=20), *norm(21, 64), *(weights(256, 64, seed=i) for i in (23, 24)),
        weights(64, 256, seed=25)]),
}  # fmt: skip


def outcome(
    function, tensors: list[Tensor], kernels: str, dtype: torch.dtype, products: torch.dtype
) -> dict[str, Tensor]:
    """Result and gradients, given tensors of ``dtype``; products under autocast if these are to be in another one."""
    given = [x.to(dtype).detach().clone().requires_grad_(x is not MASK) for x in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=products != dtype):
        out = function(*given, kernels=kernels)
    # Without an error of its own in any of the dtypes.
    out.backward(random(*out.shape, seed=99).bfloat16().to(out.dtype))
    return {"out": out.detach()} | {str(i): x.grad for i, x in enumerate(given) if x.requires_grad}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_fused_as_torch_in_fp64(case, precision):
    function, tensors = CASES[case]
    dtype, products = PRECISIONS[precision]
    # Rounded first: the error of the arithmetic is meant, not that of what it is given.
    tensors = [x if x is MASK else x.to(dtype).double() for x in tensors]
    expected = outcome(function, tensors, "torch", torch.float64, torch.float64)
    found = outcome(function, tensors, "triton", dtype, products)
    errors = {name: error(found[name], x) for name, x in expected.items()}
    print(case, precision, {name: f"{e:.1e}" for name, e in errors.items()})
    assert 0 < max(errors.values()) < BOUNDS[products], errors
    for name, x in outcome(function, tensors, "torch", dtype, products).items():
        assert found[name].dtype == x.dtype
