"""The MSA's fused kernels, run by Triton's interpreter: forward and every gradient, against torch's form in fp64.

Errors are relative, of norms: in fp32 those of its rounding; in bf16 a few times that of 8 bits, in part because the
interpreter cuts off where GPUs round.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cpfold_train.kernels import outer_product_mean as opm
from cpfold_train.kernels import pair_weighted_averaging as pwa
from cpfold_train.kernels.layer_norm import layer_norm, layer_norm_beside
from cpfold_train.kernels.normed_projection import normed_projection
from cpfold_train.kernels.work import WORK
from cpfold_train.model.msa import OuterProductMean, PairWeightedAveraging
from cpfold_train.ops import outer_product_mean as opm_op
from cpfold_train.ops.outer_product_mean import pair_counts
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.parity import Case, run
from tests.parity import DEPTHS, LENGTHS, join, real

pytest.importorskip("triton")

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Relative error of results and gradients, by dtype of the products."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def gradients(function, tensors: list[Tensor], grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """The result and the gradients of all tensors."""
    given = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*given)
    grad = random(*out.shape, seed=9) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))


def close(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    errors = [error(x, y) for x, y in zip(found, exact, strict=True)]
    assert all(0 < e < BOUNDS[dtype] for e in errors), errors


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("c", [16, 64, 100, 384])
def test_layer_norm(c, dtype):
    x, weight, bias = 2 * random(3, 11, c, seed=1).to(dtype) + 1, random(c, seed=2).float(), random(c, seed=3).float()
    # What the sums of the gradient's own elements are in bf16 has no error of its own.
    grad = random(3, 11, c, seed=9).to(dtype)
    for given in ([x, weight, bias], [x, weight]):
        norm = partial(lambda x, w, b=None, kernels="": layer_norm(x, w, b, kernels))
        found = gradients(partial(norm, kernels="triton"), given, grad)
        exact = gradients(partial(norm, kernels="torch"), [t.double() for t in given], grad)
        assert [t.dtype for t in found] == [dtype, *(t.dtype for t in given)]
        errors = [error(t, e) for t, e in zip(found, exact)]
        assert max(errors[:2]) < BOUNDS[dtype] and max(errors[2:]) < BOUNDS[torch.float32], errors
        assert min(errors[:3]) > 0


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_gradient_of_what_reads_x_besides_is_added_in_the_kernel(dtype):
    x, weight, bias = (
        2 * random(3, 11, 24, seed=1).to(dtype) + 1,
        random(24, seed=2).float(),
        random(24, seed=3).float(),
    )

    def residual(x, w, b, kernels=""):
        normed, x = layer_norm_beside(x, w, b, kernels, x.dtype)
        return 2 * normed + 3 * x

    grad = random(3, 11, 24, seed=9).to(dtype)
    found = gradients(partial(residual, kernels="triton"), [x, weight, bias], grad)
    exact = gradients(partial(residual, kernels="torch"), [t.double() for t in (x, weight, bias)], grad)
    errors = [error(t, e) for t, e in zip(found, exact)]
    assert 0 < max(errors) < BOUNDS[dtype], errors


def test_layer_norm_writes_what_is_asked_for_and_leaves_fp64_to_torch():
    x, weight = random(5, 24, seed=1), random(24, seed=2)
    assert layer_norm(x, weight, None, "triton").equal(layer_norm(x, weight, None, "torch"))
    narrow = layer_norm(x.float(), weight.float(), None, "triton", torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert error(narrow, layer_norm(x, weight, None, "torch")) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("out", [8, 20])
def test_normed_projection(out, mixed):
    """143 positions a sample: no whole number of blocks, and more than one for each program."""
    x = 2 * random(2, 11, 13, 32, seed=1) + 0.5
    given = [x, 1 + 0.3 * random(32, seed=2), 0.3 * random(32, seed=3), random(out, 32, seed=4) / 6]
    dtype = torch.bfloat16 if mixed else torch.float32
    grad = random(2, 11, 13, out, seed=9).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = gradients(partial(normed_projection, kernels="triton"), [t.float() for t in given], grad)
    close(found, gradients(partial(normed_projection, kernels="torch"), given, grad), dtype)
    assert found[0].dtype == dtype


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_softmax_and_average(dtype, monkeypatch):
    """Rows of two and a half blocks of keys, two samples with different masks."""
    from cpfold_train.kernels.triton import pair_weighted_averaging as kernel

    monkeypatch.setattr(kernel, "BLOCK", 16)
    mask = torch.ones(2, 37)
    mask[0, 20:] = mask[1, 3:9] = 0
    logits, v = (3 * random(2, 3, 5, 37, seed=1)).to(dtype), random(2, 3, 37, 4, 8, seed=2).to(dtype)
    out = pwa.fused_average(mask, logits, v)
    grad = random(*out.shape, seed=9).to(dtype)
    none, *found = pwa.fused_average_gradients(grad, mask, logits, v)
    assert none is None and {x.dtype for x in (out, *found)} == {dtype}
    exact = gradients(partial(pwa.weighted_average, mask.double()), [logits.double(), v.double()], grad)
    close((out, *found), exact, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("c, c_z", [(32, 24), (16, 128)])
def test_outer_product_mean(c, c_z, dtype, monkeypatch):
    """Blocks of two rows, of which the last is smaller, and rows that are no whole number of tiles."""
    from cpfold_train.kernels.triton import outer_product_mean as kernel

    for tile in (kernel.PROJECT, kernel.UNPROJECT, kernel.WEIGHT, kernel.WIDE):
        monkeypatch.setitem(tile[0], "PAIRS", 16)
        monkeypatch.setitem(tile[0], "CHANNELS", c * c // 2)
    monkeypatch.setattr(opm, "OUTER_BYTES", 2 * 2 * 19 * c * c * dtype.itemsize)
    a, b = random(2, 11, 5, c, seed=1).to(dtype), random(2, 11, 19, c, seed=2).to(dtype)
    count = torch.randint(1, 12, (2, 5, 19), generator=torch.Generator().manual_seed(3)).float()
    weight, bias = random(c_z, c * c, seed=4).float() / c, random(c_z, seed=5).float()
    out = opm.fused_mean(a, b, count, weight, bias)
    grad = random(*out.shape, seed=9).to(dtype)
    found = opm.fused_mean_gradients(grad, a, b, count, weight)
    assert [x.dtype for x in (out, *found)] == [dtype, dtype, torch.float32, torch.float32]

    def exactly(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return opm.outer_product_mean(a, b, count.double(), weight) + bias.double()

    close((out, *found), gradients(exactly, [a.double(), b.double(), weight.double()], grad), dtype)


N, S, B, C_M, C_Z = max(LENGTHS), max(DEPTHS), len(LENGTHS), 12, 10
TOKEN_MASK = torch.stack([torch.arange(N) < n for n in LENGTHS]).double()
MSA_MASK = torch.stack([torch.arange(S) < s for s in DEPTHS]).double()[:, :, None] * TOKEN_MASK[:, None]
INPUTS = {
    "m": random(B, S, N, C_M, seed=3),
    "z": random(B, N, N, C_Z, seed=1),
    "token_mask": TOKEN_MASK,
    "msa_mask": MSA_MASK,
}


def averaging(module, x, cp):
    return module(x["m"], x["z"], x["token_mask"], cp)


def outer_product(module, x, cp):
    return module(x["m"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp)


OPS = {
    "averaging": (PairWeightedAveraging, averaging, {"m": "msa", "z": "pair", "token_mask": "token"}, "msa"),
    "outer product": (OuterProductMean, outer_product, {"m": "msa", "msa_mask": "msa"}, "pair"),
}


def on_a_grid(cp, op: str, kernels: str, fetched_bytes: int, mixed: bool) -> dict:
    """What :func:`~cpfold_train.testing.parity.run` finds on this rank, in fp32 or under autocast."""
    from cpfold_train.kernels.triton import outer_product_mean as kernel

    for tile in (kernel.PROJECT, kernel.UNPROJECT, kernel.WEIGHT, kernel.WIDE):
        # The fewer steps the faster is the interpreter.
        tile[0].update(PAIRS=16, CHANNELS=1024)
    cls, call, placements, out = OPS[op]

    def called(*args) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = call(*args)
        assert found.dtype == torch.bfloat16 or not mixed
        return found.float()

    cp.kernels, before, opm_op.GATHERED_BYTES = kernels, opm_op.GATHERED_BYTES, fetched_bytes
    try:
        inputs = {name: INPUTS[name].float() for name in placements}
        return run(cp, Case(partial(cls, C_M, C_Z), called, inputs, placements, out))
    finally:
        cp.kernels, opm_op.GATHERED_BYTES = "torch", before


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "rows, cols, fetched_bytes, bound",
    [pytest.param(1, 1, 1 << 31, 2e-2, marks=pytest.mark.slow), (2, 3, 30_000, 2e-6)],
    ids=["1x1 in bf16", "2x3 in parts"],
)
def test_ops_with_fused_kernels_are_those_of_torch(ranks, op, rows, cols, fetched_bytes, bound):
    """30,000 bytes are about half of what a rank of 2x3 fetches of a and b."""
    (serial,) = ranks.run(on_a_grid, 1, 1, op, "torch", 1 << 31, False)
    parts = ranks.run(on_a_grid, rows, cols, op, "triton", fetched_bytes, rows == 1)
    placements, placed = OPS[op][2:]
    grid = Grid(rows, cols)
    out = join([part["out"] for part in parts], placed, grid, partial=False)
    errors = {"out": error(real(out, placed), real(serial["out"], placed).double())}
    for kind in ("inputs", "parameters"):
        for name, exact in serial[kind].items():
            placement = placements.get(name, "whole") if kind == "inputs" else "whole"
            found = join([part[kind][name] for part in parts], placement, grid, partial=True)
            errors[name] = error(real(found, placement), real(exact, placement).double())
    # A softmax does not see what all logits of a row have in common: this gradient is nothing but rounding.
    errors.pop("norm_z.bias", None)
    assert len(errors) > 6 and errors["out"] > 0 and max(errors.values()) < bound, errors


def test_operators_have_the_shapes_and_dtypes_that_a_plan_is_told():
    a, b, count = torch.randn(2, 7, 3, 16), torch.randn(2, 7, 5, 16), torch.ones(2, 3, 5)
    mean_grad, weight = torch.randn(2, 3, 5, 20), torch.randn(20, 256)
    outer, rows = torch.randn(2, 48, 80), torch.randn(3, 4, 24)
    logits, scale = torch.randn(2, 3, 4, 9), torch.ones(24)
    calls = {
        "layer_norm": (rows, scale, scale, torch.bfloat16),
        "layer_norm_backward": (rows, rows.bfloat16(), scale, rows.bfloat16()),
        "normed_projection": (torch.randn(3, 4, 32), torch.randn(5, 32), torch.randn(5), torch.bfloat16),
        "normed_projection_backward": (torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 4, 32), torch.randn(5, 32)),
        "masked_softmax": (logits, torch.ones(2, 9), torch.bfloat16),
        "masked_softmax_backward": (logits.bfloat16(), logits.bfloat16(), torch.float32),
        "outer_project": (outer, count, weight, None),
        "outer_unproject": (mean_grad, weight),
        "outer_weight_gradient": (outer, mean_grad),
    }
    for name, args in calls.items():
        operator = getattr(torch.ops.cpfold, name)
        found = operator(*args)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (found, fake)), strict=True)
        assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs), name
        told = WORK[name](*args, found)
        assert told.launches >= 1 and (told.flops > 0) == name.startswith(("outer", "normed")), name
    assert WORK["outer_project"](*calls["outer_project"], None).flops == 2 * 2 * 3 * 5 * 256 * 20
    assert opm.fused_mean(a, b, count, weight, None).shape == (2, 3, 5, 20)
