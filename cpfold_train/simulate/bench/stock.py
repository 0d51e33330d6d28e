"""Time a module of the stock ``boltz`` package on given weights: run by the interpreter of an environment that has it.

    python -m cpfold_train.simulate.bench.stock IN.pt OUT.pt

IN.pt holds ``op``, ``state``, ``n``, ``depth``, ``widths``, ``repeats``, ``threads``, ``dtype`` and ``device``; OUT.pt
gets the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from boltz.model.layers.attentionv2 import AttentionPairBias
from boltz.model.layers.outer_product_mean import OuterProductMean
from boltz.model.layers.pair_averaging import PairWeightedAveraging
from boltz.model.layers.pairformer import PairformerLayer
from boltz.model.layers.transition import Transition
from boltz.model.layers.triangular_attention.attention import TriangleAttention
from boltz.model.layers.triangular_mult import TriangleMultiplicationOutgoing
from boltz.model.modules.trunkv2 import MSALayer
from torch import Tensor

from cpfold_train.simulate.bench.inputs import precision
from cpfold_train.simulate.bench.measure import measure

CASES = {
    "triangle_multiplication": (
        lambda w: TriangleMultiplicationOutgoing(w["token_z"]),
        lambda f, x, **kernels: (f(x["z"], x["pair_mask"], **kernels),)),
    "triangle_attention_start": (
        lambda w: TriangleAttention(w["token_z"], 32, 4),
        lambda f, x, **kernels: (f(x["z"], x["pair_mask"], **kernels),)),
    "triangle_attention_end": (
        lambda w: TriangleAttention(w["token_z"], 32, 4, starting=False),
        lambda f, x, **kernels: (f(x["z"], x["pair_mask"], **kernels),)),
    "outer_product_mean": (
        lambda w: OuterProductMean(w["msa_s"], 32, w["token_z"]), lambda f, x: (f(x["m"], x["msa_mask"]),)),
    "pair_weighted_averaging": (
        lambda w: PairWeightedAveraging(w["msa_s"], w["token_z"], 32, 8),
        lambda f, x: (f(x["m"], x["z"], x["pair_mask"], False),)),
    "attention_pair_bias": (
        lambda w: AttentionPairBias(w["token_s"], w["token_z"], 16),
        lambda f, x: (f(x["s"], x["z"], x["mask"], x["s"]),)),
    "transition": (lambda w: Transition(w["token_z"], 4 * w["token_z"]), lambda f, x: (f(x["z"]),)),
    "msa_block": (
        lambda w: MSALayer(w["msa_s"], w["token_z"], 0.0, 0.0),
        lambda f, x, **kernels: f(x["z"], x["m"], x["pair_mask"], x["msa_mask"], **kernels)),
    "pairformer_block": (
        lambda w: PairformerLayer(w["token_s"], w["token_z"], 16, 0.0, v2=True),
        lambda f, x, **kernels: f(x["s"], x["z"], x["mask"], x["pair_mask"], **kernels)),
}  # fmt: skip
"""How to build a module of some widths, and how it is called; those that have kernels of NVIDIA's take
``use_kernels``."""


def stock_step(
    op: str,
    widths: dict[str, int],
    n: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    state: dict[str, Tensor] | None = None,
    **kernels: bool,
) -> Callable[[], None]:
    """Forward and backward pass of a module of the package as a call.

    Args:
        op: one of :data:`CASES`.
        widths: ``token_s``, ``token_z`` and ``msa_s``.
        n, depth: tokens and MSA sequences.
        dtype: as :func:`cpfold_train.simulate.bench.inputs.precision` takes it.
        device: on which it runs.
        state: weights; None leaves those that the package draws.
        kernels: ``use_kernels``, for those that take it.
    """
    build, call = CASES[op]
    weights, mixed = precision(dtype, device)
    module = build(widths).train()
    if state is not None:
        module.load_state_dict(state, strict=True)
    module.to(device, weights)
    # As on our ranks, there is room for them before the first step.
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    x = {
        "s": random(1, n, widths["token_s"], dtype=weights),
        "z": random(1, n, n, widths["token_z"], dtype=dtype),
        "m": random(1, depth, n, widths["msa_s"], dtype=dtype),
        "mask": torch.ones(1, n, dtype=weights, device=device),
        "pair_mask": torch.ones(1, n, n, dtype=weights, device=device),
        "msa_mask": torch.ones(1, depth, n, dtype=weights, device=device),
    }

    def forward() -> tuple[Tensor, ...]:
        with mixed:
            return call(module, x, **kernels)

    grads = [torch.randn_like(out) for out in forward()]

    def step() -> None:
        torch.autograd.backward(forward(), grads)

    return step


def main(source: str, target: str) -> None:
    """Build, load, time."""
    given = torch.load(source, weights_only=True)
    torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    sizes = given["widths"], given["n"], given["depth"], given["dtype"]
    step = stock_step(given["op"], *sizes, device, given["state"])
    torch.save(asdict(measure(step, given["repeats"], device, lambda: None)), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
