"""Fused kernels of the pair stack's local parts, run by Triton's interpreter: forward and every gradient.

Each is compared with torch's form in fp64. Errors are relative, of norms: in fp32 those of its rounding; in bf16 a
few times 2 ** -9, because several factors are rounded, and the interpreter cuts off where GPUs round to nearest.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.kernels.gated_output import gated_output
from cpfold_train.kernels.gated_projection import gated_projection, gated_projection_beside
from cpfold_train.kernels.linear import linear_by
from cpfold_train.kernels.transition import transition
from cpfold_train.kernels.work import NAMESPACE, WORK, Work
from cpfold_train.model.pair_stack import (
    PairStack,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
    pair_dropout,
)
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.parity import Case, run
from tests.parity import LENGTHS, join, real

pytest.importorskip("triton")

B, ROWS, COLS, C, HIDDEN = 2, 5, 13, 32, 128
"""65 pairs a sample: neither a multiple of a block nor of half of one."""
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
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


def projected_beside(z: Tensor, *others: Tensor, kernels: str) -> Tensor:
    """With a residual of z, which comes out of the projection too."""
    y, z = gated_projection_beside(z, *others, kernels=kernels)
    return y.chunk(2, 1)[0].permute(0, 2, 3, 1) + 3 * z


CASES = {
    "gated projection": (gated_projection, PROJECTION),
    "gated projection, beside": (projected_beside, PROJECTION),
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


def test_fp64_and_replaced_products_take_torch():
    """Bit for bit; and where linear layers are computed otherwise, these are."""
    for function, tensors in (CASES["gated output, dropout"], CASES["transition, residual"]):
        expected, found = (
            outcome(function, tensors, kernels, torch.float64, torch.float64) for kernels in ("torch", "triton")
        )
        assert all(torch.equal(x, found[name]) for name, x in expected.items())
        instead = Mock(side_effect=nn.functional.linear)
        with linear_by(instead):
            function(*(x.float() for x in tensors), kernels="triton")
        assert instead.called


PLACEMENTS = {"z": "pair", "token_mask": "token"}


def multiplied(module: nn.Module, x: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    return module(x["z"], pair_mask(x["token_mask"], cp.grid), cp)


def updated(module: nn.Module, x: dict[str, Tensor], cp: ContextParallel) -> Tensor:
    dropout = pair_dropout(0.25, x["token_mask"].shape[1], RandomStreams(torch.tensor([3, 4])))
    return module.update_pairs(x["z"], x["token_mask"], cp, dropout)


BLOCKS = {
    "outgoing": (TriangleMultiplicationOutgoing, (C,), multiplied),
    "incoming": (TriangleMultiplicationIncoming, (C,), multiplied),
    "pair stack": (PairStack, (C, 8, 2), updated),
}


def on_a_grid(cp: ContextParallel, block: str, kernels: str, dtype: torch.dtype) -> dict:
    """Output and gradients of a block on this rank, with dropout."""
    build, sizes, call = BLOCKS[block]
    n = max(LENGTHS)
    mask = torch.stack([torch.arange(n) < length for length in LENGTHS]).double()
    inputs = {"z": random(len(LENGTHS), n, n, C, seed=30), "token_mask": mask}

    def in_dtype(module: nn.Module, x: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        return call(module, {name: value.to(dtype) for name, value in x.items()}, cp).double()

    cp.kernels = kernels
    try:
        return run(cp, Case(lambda: build(*sizes).to(dtype), in_dtype, inputs, PLACEMENTS, "pair"))
    finally:
        cp.kernels = "torch"


@pytest.mark.parametrize(
    "block, grid",
    [
        ("outgoing", (1, 1)),
        ("incoming", (1, 2)),
        pytest.param("pair stack", (1, 1), marks=pytest.mark.slow),
        ("pair stack", (1, 2)),
        pytest.param("pair stack", (2, 3), marks=pytest.mark.slow),
    ],
)
def test_blocks_on_grids(ranks, block, grid):
    """With Triton's kernels in fp32 as with torch on 1x1 in fp64."""
    (expected,) = ranks.run(on_a_grid, 1, 1, block, "torch", torch.float64)
    parts = ranks.run(on_a_grid, *grid, block, "triton", torch.float32)
    pairs = {"out": [part["out"] for part in parts], "z": [part["inputs"]["z"] for part in parts]}
    found = {name: real(join(x, "pair", Grid(*grid), partial=False), "pair") for name, x in pairs.items()}
    found |= {name: sum(part["parameters"][name].double() for part in parts) for name in expected["parameters"]}
    wanted = {"out": real(expected["out"], "pair"), "z": real(expected["inputs"]["z"], "pair")}
    errors = {name: error(found[name], x) for name, x in (wanted | expected["parameters"]).items()}
    print(block, grid, {name: f"{e:.1e}" for name, e in errors.items()})
    assert 0 < max(errors.values()) < 5e-6, errors


class Watch(TorchDispatchMode):
    """Lists the fused operators that run, with what each of them says it does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Work]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            name = func._schema.name.split("::")[1]
            self.seen.append((name, WORK[name](*args, out)))
        return out


@pytest.mark.parametrize("case", CASES)
def test_planned_as_run(case):
    """Fake tensors take the same way and are as large; what each operator does is known."""
    function, tensors = CASES[case]
    found, seen = [], []
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, Watch() as watch:
            out = outcome(function, tensors, "triton", torch.float32, torch.bfloat16)
        found.append({name: (x.shape, x.dtype, x.stride()) for name, x in out.items()})
        seen.append(watch.seen)
    assert found[0] == found[1]
    assert seen[0] == seen[1]
    (name, forward), *others = seen[0]
    assert [other for other, _ in others] == [f"{name}_backward", f"{name}_weights"]
    assert all(1.6 < work.flops / forward.flops <= 2 and work.moved_bytes > 0 for _, work in others)


@pytest.mark.parametrize("case", ["gated projection", "gated output, dropout", "transition, residual"])
def test_only_inputs_are_kept(case):
    """z, the mask and the product, for the backward pass: no projection and no hidden channel."""
    function, tensors = CASES[case]
    given = [x.float().requires_grad_() for x in tensors]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(*given, kernels="triton")
    tiles = {x.data_ptr() for x in kept if x.numel() >= MASK.numel() and len(x) == B}
    assert tiles and tiles <= {x.data_ptr() for x in given}
