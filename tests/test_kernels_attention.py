"""Attention in Triton's kernels, interpreted on CPU, against the formula in fp64: results and every gradient."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.kernels import attention_operators
from cpfold_train.kernels.attention import biased_attention, gated_attention
from cpfold_train.kernels.attention_operators import Blocks, Tiling
from cpfold_train.kernels.partial_attention import partial_attention, partial_gradients
from cpfold_train.kernels.work import NAMESPACE, WORK
from cpfold_train.model.pair_stack import TriangleAttentionEndingNode, TriangleAttentionStartingNode
from cpfold_train.model.pairformer import AttentionPairBias
from cpfold_train.ops import triangle_attention
from cpfold_train.ops.attention_pair_bias import all_tokens
from cpfold_train.ops.recompute import recompute
from cpfold_train.ops.token_attention import token_attention
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from tests.parity import cut, join, randomise

pytest.importorskip("triton", reason="the triton package is not installed")

WITHIN = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Largest error beside the largest value, by dtype of the inputs: some 10 roundings."""
CASES = {
    "one block": (1, 2, 1, 20, 13, 32, torch.float32),
    "one block in fp16": (1, 2, 1, 20, 13, 32, torch.float16),
    "two samples, odd": (2, 3, 1, 37, 70, 16, torch.float32),
    "two samples, odd, in bf16": (2, 3, 1, 37, 70, 16, torch.bfloat16),
    "width of token attention": (1, 1, 2, 40, 33, 48, torch.float32),
    "width of token attention in bf16": (1, 1, 2, 40, 33, 48, torch.bfloat16),
    "widest": (1, 1, 1, 33, 64, 64, torch.bfloat16),
    "several blocks": (1, 2, 1, 140, 150, 24, torch.bfloat16),
}
"""B, r, h, M, N, d and the dtype of the inputs."""


@contextmanager
def small_tiles() -> Iterator[None]:
    """Fewer and larger programs in fp32 than on a GPU, for the interpreter's sake; two rows in each."""
    before, attention_operators.FULL = (
        attention_operators.FULL,
        Tiling(*[Blocks(64, 64, 2, 4, 1)] * 4, joined=Blocks(32, 64, 1, 4, 1)),
    )
    try:
        yield
    finally:
        attention_operators.FULL = before


@pytest.fixture(autouse=True)
def _small_tiles():
    with small_tiles():
        yield


@pytest.fixture
def joined(monkeypatch):
    """One kernel for the gradients of queries and keys, however few rows there are."""
    monkeypatch.setattr(attention_operators, "JOINED_PROGRAMS", 1)


def made_up(B: int, r: int, h: int, M: int, N: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries and gates (B, r, M, 2, h, d), keys and values (B, r, N, 2, h, d), a bias and weights of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, r, M, 2, h, d), (B, r, N, 2, h, d), (B, h, M, N), (B, r, M, h, d)
    qg, kv, bias, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    bias[0, :, :, -N // 4 :] = -1e9
    bias = bias.to(torch.promote_types(dtype, torch.bfloat16))
    return (qg * d**-0.25).to(dtype), kv.to(dtype), bias, weight.to(dtype)


def formula(qg: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
    (q, g), (k, v) = (x.permute(3, 0, 1, 4, 2, 5) for x in (qg, kv))
    return (torch.softmax(q @ k.mT + bias[:, None], -1) @ v * g.sigmoid()).transpose(2, 3)


def with_gradients(function, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    *inputs, weight = (x.to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < WITHIN[dtype], f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gated_attention(case):
    """Of one row and of more, of few keys and of many, masked, of widths that are no power of two."""
    tensors, dtype = made_up(*case), case[-1]
    expected = with_gradients(formula, tensors, torch.float64)
    qg, kv, bias, weight = tensors
    inputs = [x.requires_grad_() for x in (qg, kv, bias)]
    out = gated_attention(*inputs, "triton")
    assert out.is_contiguous() and out.dtype == dtype
    found = [out.detach(), *torch.autograd.grad(out, inputs, weight)]
    for name, one, other in zip(("out", "dqg", "dkv", "dbias"), found, expected):
        close(one, other, dtype, name)


@pytest.mark.parametrize(
    "case", [(2, 3, 2, 37, 70, 16, torch.float32), (1, 2, 1, 70, 300, 24, torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_one_kernel_for_queries_and_keys(case, joined):
    """Of several incomplete blocks of both."""
    assert attention_operators.joined_blocks(torch.empty(*case[:4], case[5], dtype=case[6]))
    test_gated_attention(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_one_kernel_adds_to_what_other_parts_of_the_keys_gave(dtype, joined):
    test_parts_of_the_keys_merge(dtype)


def test_biases_far_apart_and_far_from_zero():
    """The gradient of the bias is a sum that is multiplied by what its bias makes of the weight."""
    qg, kv, bias, weight = made_up(1, 3, 1, 37, 40, 16, torch.float32)
    offsets = torch.randn(1, 1, 37, 1, generator=torch.Generator().manual_seed(1))
    tensors = 4 * qg, kv, (8 * bias + 100 * offsets).clamp(min=-1e9), weight
    expected = with_gradients(formula, tensors, torch.float64)
    found = with_gradients(partial(gated_attention, kernels="triton"), tensors, torch.float32)
    for name, one, other in zip(("out", "dqg", "dkv", "dbias"), found, expected):
        # Scores of some hundreds have errors of 1e-5 in fp32.
        assert (one.double() - other).abs().max() < 1e-4 * other.abs().max(), name


def by_head(qg: Tensor, kv: Tensor) -> list[Tensor]:
    """Queries, keys and values (B, r, h, n, d), views."""
    q, k, v = qg[:, :, :, 0], kv[:, :, :, 0], kv[:, :, :, 1]
    return [x.transpose(2, 3) for x in (q, k, v)]


def test_without_gate_and_of_any_strides(monkeypatch):
    """One program for all rows of a tile of the bias, and one block of queries or keys in L2 at a time."""
    from cpfold_train.kernels.triton import attention_backward

    monkeypatch.setattr(attention_backward, "PROGRAMS", 1)
    monkeypatch.setattr(attention_operators, "BIAS_BYTES", 1)
    dtype = torch.float32
    qg, kv, bias, weight = made_up(1, 3, 1, 66, 70, 16, dtype)
    tensors = *(x.contiguous() for x in by_head(qg, kv)), bias.mT.contiguous().mT, weight.transpose(2, 3)
    for kernels, to in (("torch", torch.float64), ("triton", dtype)):
        found = with_gradients(partial(biased_attention, kernels=kernels), tensors, to)
        if kernels == "torch":
            expected = found
    for name, one, other in zip(("out", "dq", "dk", "dv", "dbias"), found, expected):
        close(one, other, dtype, name)
    q = tensors[0].detach().requires_grad_()
    biased_attention(q, *(x.detach() for x in tensors[1:4]), "triton").sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_parts_of_the_keys_merge(dtype):
    """The last part has masked keys only. Each adds to the gradients of queries, given what all parts found."""
    qg, kv, bias, weight = made_up(1, 2, 1, 30, 48, 16, dtype)
    weight = weight.transpose(2, 3)
    bias_64 = bias.double().requires_grad_()
    inputs = [x.double().requires_grad_() for x in by_head(qg, kv)]
    scores = inputs[0] @ inputs[1].mT + bias_64[:, None]
    expected = torch.softmax(scores, -1) @ inputs[2]
    grads = torch.autograd.grad((expected * weight.double()).sum(), [*inputs, bias_64])

    q, k, v = by_head(qg, kv)
    parts = [slice(0, 17), slice(17, 36), slice(36, 48)]
    found = [partial_attention(q, k[..., i, :], v[..., i, :], bias[..., i], "triton") for i in parts]
    logs = torch.stack([log for _, log in found])
    total = logs.logsumexp(0)
    out = sum(part * (log - total).exp()[..., None] for part, log in found)
    close(out, expected.detach(), dtype, "out")
    close(total, scores.logsumexp(-1).detach(), dtype, "log-sum-exp")

    dq = torch.zeros(q.shape)
    shift = (out * weight).sum(-1, dtype=torch.float32)
    back = []
    for i in parts:
        dbias = torch.zeros_like(bias[..., i], dtype=torch.float32, memory_format=torch.contiguous_format)
        some = q, k[..., i, :], v[..., i, :], bias[..., i]
        back.append((*partial_gradients(*some, weight, total, shift, dq, dbias, "triton"), dbias))
    dk, dv, dbias = (torch.cat(some, dim) for some, dim in zip(zip(*back), (-2, -2, -1)))
    for name, one, other in zip(("dq", "dk", "dv", "dbias"), (dq, dk, dv, dbias), grads):
        close(one, other, dtype, name)


def test_queries_without_keys_get_zeros_and_no_gradient():
    qg, kv, bias, weight = made_up(1, 1, 1, 18, 20, 16, torch.bfloat16)
    bias[:, :, 5] = -1e9
    tensors = [x.requires_grad_() for x in (qg, kv, bias)]
    out = gated_attention(*tensors, "triton")
    assert not out[:, :, 5].any() and out.isfinite().all()
    for grad in torch.autograd.grad(out, tensors, weight):
        assert grad.isfinite().all()


def test_operators_are_as_they_are_declared():
    """Shapes, strides and dtypes without contents, what is written where, and what a plan is told."""
    qg, kv, bias, weight = made_up(1, 2, 2, 20, 18, 16, torch.float32)
    (q, k, v), gate = by_head(qg, kv), qg[:, :, :, 1].transpose(2, 3)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.cpfold
    torch.library.opcheck(ops.attention, (q, k, v, bias, gate), test_utils=checks)
    out, lse = ops.attention(q, k, v, bias, gate)
    grad, dgate = weight.transpose(2, 3), torch.empty_like(gate)
    torch.library.opcheck(ops.attention_delta, (grad, out, gate, dgate), test_utils=checks)
    torch.library.opcheck(ops.attention_delta, (grad, out, None, None), test_utils=checks)
    delta, before = ops.attention_delta(grad, out, gate, dgate)
    grads = [torch.zeros_like(x) for x in (q, k, v, bias)]
    args = q, k, v, bias, before, lse, delta, *grads, False
    torch.library.opcheck(ops.attention_backward, args, test_utils=checks)

    product = 2 * q.numel() * k.shape[3]
    forward, backward = WORK["attention"](q, k, v, bias, gate, (out, lse)), WORK["attention_backward"](*args, None)
    assert (forward.flops, [one.flops for one in backward]) == (2 * product, [4 * product, 3 * product, 2 * product])
    scores = q[..., 0].numel() * k.shape[3]
    assert {one.exps for one in (forward, *backward)} == {scores}
    # In tiles of 64 x 64, of two rows but for the bias: of fp32 of width 16.
    assert forward.l2_bytes == backward[1].l2_bytes == scores * (4 / 2 + 2 * 16 * 4 / 64)
    assert [one.l2_bytes for one in backward[::2]] == [scores * (2 + 136 / 64), scores * (128 + 136) / 64]
    read = [q, k, v, bias, gate, out, lse]
    assert forward.moved_bytes == sum(x.numel() * 4 for x in read)


N, C_Z = 6, 8
LAYERS = {"start": TriangleAttentionStartingNode, "end": TriangleAttentionEndingNode}


def triangle(cp, node: str, algorithm: str, kernels: str, dtype: torch.dtype) -> list[Tensor]:
    """Update of a rank's tile times factors of its rows, or columns, and added to it; gradients of z and of the
    parameters."""
    before = cp.algorithm, cp.kernels
    cp.algorithm, cp.kernels = algorithm, kernels
    try:
        layer = LAYERS[node](C_Z, 16, 1).double()
        randomise(layer)
        z, weight = torch.randn(2, 1, N, N, C_Z, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z, weight = (cut(x, "pair", cp.grid).to(dtype).contiguous() for x in (z, weight))
        mask = torch.ones(1, N, dtype=dtype)
        mask[0, 5:] = 0
        positions = cp.grid.row_tokens(N) if node == "start" else cp.grid.col_tokens(N)
        factors = torch.arange(N).remainder(3)[None, slice(*positions)].to(dtype)
        with small_tiles():
            out = layer.to(dtype)(z.requires_grad_(), mask, cp, True, factors)
            return [out.detach(), *torch.autograd.grad((out * weight).sum(), [z, *layer.parameters()])]
    finally:
        cp.algorithm, cp.kernels = before


def tokens(cp, kernels: str, dtype: torch.dtype) -> list[Tensor]:
    """What a shard of the tokens gets, and gradients of queries, keys, values and the tile of the bias."""
    before, cp.kernels = cp.kernels, kernels
    try:
        generator = torch.Generator().manual_seed(0)
        *qkv, weight = torch.randn(4, 3, N, 1, 48, generator=generator, dtype=torch.float64)
        bias = torch.randn(1, N, N, 1, generator=generator, dtype=torch.float64)
        bias[:, :, 5:] = -1e6
        *qkv, weight = (cut(x / 2, "shard", cp.grid).to(dtype).requires_grad_() for x in (*qkv, weight))
        bias = cut(bias, "pair", cp.grid).to(dtype).requires_grad_()
        with small_tiles():
            out = token_attention(*qkv, bias.permute(0, 3, 1, 2), cp)
            return [out.detach(), *torch.autograd.grad((out * weight).sum(), [*qkv, bias])]
    finally:
        cp.kernels = before


def singles(cp, kernels: str, dtype: torch.dtype) -> list[Tensor]:
    """A rank's part of the update of s, and of the gradients of s, z and the parameters; its tile's of z."""
    before, cp.kernels = cp.kernels, kernels
    try:
        layer = AttentionPairBias(48, C_Z, 2).double()
        randomise(layer)
        generator = torch.Generator().manual_seed(0)
        s, weight = torch.randn(2, 1, N, 48, generator=generator, dtype=torch.float64).to(dtype)
        z = cut(torch.randn(1, N, N, C_Z, generator=generator, dtype=torch.float64), "pair", cp.grid).to(dtype)
        mask = torch.ones(1, N, dtype=dtype)
        mask[:, 5:] = 0
        given = s.requires_grad_(), z.contiguous().requires_grad_()
        with small_tiles():
            # All ranks have all of it.
            out = all_tokens(layer.to(dtype)(*given, mask, cp), cp) / cp.grid.cp_size
            # A softmax does not see what is added to all scores of a query.
            trained = [p for name, p in layer.named_parameters() if name != "proj_z.0.bias"]
            return [out.detach(), *torch.autograd.grad((out * weight).sum(), [*given, *trained])]
    finally:
        cp.kernels = before


def compare(ranks, grid: tuple[int, int], function, args: tuple, placements: list[str]) -> None:
    """A grid with Triton's kernels in fp32 with one rank and torch's in fp64."""
    (expected,) = ranks.run(function, 1, 1, *args, "torch", torch.float64)
    parts = ranks.run(function, *grid, *args, "triton", torch.float32)
    for i, (part, one) in enumerate(zip(zip(*parts), expected)):
        placement = placements[i] if i < len(placements) else "whole"
        found = join(list(part), placement, Grid(*grid), partial=placement == "whole")
        close(found, one, torch.float32, f"tensor {i}")


@pytest.mark.parametrize(
    "node, grid, algorithm",
    [
        ("start", (1, 1), "alltoall"),
        ("end", (1, 1), "alltoall"),
        ("start", (2, 3), "alltoall"),
        ("end", (3, 1), "alltoall"),
        ("start", (1, 2), "ring"),
        ("end", (2, 1), "ring"),
    ],
)
def test_triangle_attention(ranks, node, grid, algorithm):
    compare(ranks, grid, triangle, (node, algorithm), ["pair", "pair"])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_token_attention(ranks, grid):
    compare(ranks, grid, tokens, (), ["shard", "shard", "shard", "shard", "pair"])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), pytest.param((3, 3), marks=pytest.mark.slow)])
def test_attention_pair_bias(ranks, grid):
    compare(ranks, grid, singles, (), ["whole", "whole", "pair"])


def sent_under_autocast(cp, kernels: str) -> tuple[int, Tensor]:
    """Bytes that a triangle attention sends forward in bf16-mixed, and its result."""
    before, cp.kernels, cp.algorithm = cp.kernels, kernels, "alltoall"
    try:
        torch.manual_seed(0)
        layer = TriangleAttentionStartingNode(C_Z, 16, 2)
        randomise(layer)
        z = torch.randn(1, N, N, C_Z)[:, slice(*cp.grid.row_tokens(N)), slice(*cp.grid.col_tokens(N))]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), small_tiles():
            out = layer(z, torch.ones(1, N), cp)
        return cp.ledger.total().sent_bytes, out.float()
    finally:
        cp.kernels = before


def test_what_travels_under_autocast_is_normalised_and_in_bf16(ranks):
    (plain, expected), _ = ranks.run(sent_under_autocast, 1, 2, "torch")
    (fused, found), _ = ranks.run(sent_under_autocast, 1, 2, "triton")
    rows = N * N // 4 * C_Z
    assert plain - fused == rows * (4 - 2)
    close(found, expected.double(), torch.bfloat16, "update")


class Launched(TorchDispatchMode):
    """Counts calls of this project's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_a_recomputed_block_attends_twice(node):
    """Forward, and once more where the block is computed again: what that made is kept for the backward pass."""
    n, c, heads, width = 64, 32, 2, 16
    sizes = [(c,), (c,), (heads, c), *[(heads * width, c)] * 4, (c, heads * width)]
    with fake_world(Grid(2, 2), "alltoall", "triton") as cp, FakeTensorMode(), Launched() as launched:
        w = triangle_attention.AttentionWeights(*(torch.empty(size, requires_grad=True) for size in sizes))
        z = torch.empty(1, n // 2, n // 2, c, requires_grad=True)
        attend = getattr(triangle_attention, f"triangle_attention_{node}")
        recompute(attend, z, torch.ones(1, n), w, cp).sum().backward()
    assert launched.calls["attention"] == 2 * launched.calls["attention_backward"] > 0


def test_a_gpu_attends_in_all_rows_of_4096_tokens_on_2x2_at_once():
    """Rows in several blocks would be attended in once more in the backward pass."""
    z = torch.empty(1, 512, 4096, 128, dtype=torch.bfloat16, device="meta")
    qg = kv = torch.empty(256, 128, device="meta")
    assert triangle_attention._rows_at_once(z, 4096, (qg, kv), "triton") == len(z[0])
