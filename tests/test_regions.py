"""What ``compile=true`` fuses: each region is one graph, and gives what it gives as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cpfold_train.kernels import fused, transition
from cpfold_train.kernels.regions import REGIONS, compile_regions, compiled_by
from cpfold_train.model import atom_encoder, diffusion_conditioning, transformer
from cpfold_train.ops import attention_pair_bias, pair_bias, token_attention, window_attention

B, N, DIM, COND, HEADS = 2, 5, 16, 12, 4
WINDOWS, ATOM_Z = 2, 4
KEYS = 32 * WINDOWS + 96
OF_PAIRS = [(ATOM_Z, 3), (ATOM_Z, 1), (ATOM_Z, 1), *[(ATOM_Z, ATOM_Z)] * 3]
OF_TRANSITION = [(DIM,), (DIM,), (4 * DIM, DIM), (4 * DIM, DIM), (DIM, 4 * DIM)]
ADAPTIVE = [(COND,), (DIM, COND), (DIM,), (DIM, COND)]
INPUTS: dict[str, list[tuple[int, ...] | int]] = {
    "_projections": [(B, N, DIM), HEADS, (DIM, DIM), (DIM,), *[(DIM, DIM)] * 3],
    "_gated_projection": [(B, N, HEADS, DIM // HEADS), (B, N, DIM), (DIM, DIM)],
    "_add_gated": [(B, N, DIM), (B, N, COND), (B, N, DIM), (DIM, COND), (DIM,)],
    "_adaptive_norm": [(B, N, DIM), (B, N, COND), *ADAPTIVE],
    "_transition": [
        (B, N, DIM), (B, N, COND), *ADAPTIVE, (4 * DIM, DIM), (2 * DIM, DIM), (DIM, 2 * DIM), (DIM, COND), (DIM,),
    ],
    "_attend": [(2 * B, 32 * WINDOWS, HEADS, 4), (2 * B, KEYS, HEADS, 8), (B, WINDOWS, 32, 128, HEADS), (B, KEYS)],
    "_pair_terms": [(B, WINDOWS, 32, 5 + ATOM_Z), (B, WINDOWS, 5 + ATOM_Z, 128), *OF_PAIRS],
    "_pair_terms_with_tokens": [
        (B, WINDOWS, 32, 5 + ATOM_Z), (B, WINDOWS, 5 + ATOM_Z, 128), (B, WINDOWS, 32, 128, ATOM_Z), *OF_PAIRS,
    ],
    "transition_at_once": [(B, N, DIM), *OF_TRANSITION],
    "_conditioned": [*[(B, N, N, DIM)] * 2, (2 * DIM,), (2 * DIM,), (DIM, 2 * DIM), *OF_TRANSITION, *OF_TRANSITION],
    "_pair_bias": [7, (B, N, N, DIM), (B, N, N), (DIM,), (DIM,), (HEADS, DIM)],
    "_merged": [(3, B, 2, HEADS, N, 4), (3, B, 2, HEADS, N)],
    "_scores": [(B, N, HEADS, 4), (B, 3, HEADS, 4), (B, N, 3, HEADS), (B, 3)],
    "_weighted": [(B, HEADS, N, 3), (B, HEADS, N, 1), (B, 3, HEADS, 4)],
    "_quotient": [(B, HEADS, N, 5)],
    "folded": [(DIM,), (DIM,), (HEADS, DIM), (HEADS, DIM)],
}  # fmt: skip
"""Shapes of the arguments of each region; what is no shape is the argument itself."""


MODULES = (
    transformer, window_attention, atom_encoder, transition, diffusion_conditioning, pair_bias, token_attention,
    attention_pair_bias, fused,
)  # fmt: skip
"""Where they are."""


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    compile_regions(compiled_by(backend))
    try:
        yield
    finally:
        compile_regions(None)


def found(function, arguments: list[Tensor | int]) -> list[Tensor]:
    """Results, and the gradients of all arguments."""
    leaves = [x for x in arguments if isinstance(x, Tensor)]
    out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    made = [x for x in out if x.requires_grad]
    return [*out, *torch.autograd.grad(made, leaves, [torch.cos(x.detach()) for x in made], allow_unused=True)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", INPUTS)
def test_a_region_is_one_graph(name, backend):
    """``aot_eager`` traces forward and backward as Inductor does and generates no code, which would take minutes."""
    generator = torch.Generator().manual_seed(4)

    def argument(shape: tuple[int, ...] | int) -> Tensor | int:
        if isinstance(shape, int):
            return shape
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    arguments = [argument(shape) for shape in INPUTS[name]]
    expected = found(REGIONS[name], arguments)
    called = next(getattr(m, name) for m in MODULES if hasattr(m, name))
    with compiling(backend):
        actual = found(called, arguments)
    # Folded weights are in fp32 whatever the precision.
    error = 1e-5 if name == "folded" else 1e-9
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=error, atol=error)


def test_all_regions_are_tested():
    assert INPUTS.keys() == REGIONS.keys()


def test_layers_share_a_compiled_function_under_recomputation():
    """Three layers, whose weights are arguments: the region is traced once for all of them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(1)
    module = transformer.DiffusionTransformer(3, HEADS, DIM, COND).double()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    a, s = torch.randn(B, N, DIM, dtype=torch.float64), torch.randn(B, N, COND, dtype=torch.float64)
    bias = torch.randn(1, dtype=torch.float64)

    def step() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        out = module(a, s, lambda i: bias, lambda q, k, v, b: (q + k + b) * v, checkpoint=True)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in module.parameters())]

    expected = step()
    with compiling("aot_eager"):
        actual = step()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # One graph for each of the five regions of a layer, and one more of each that first runs without gradients.
    assert 5 <= graphs <= 10
