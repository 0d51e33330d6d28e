"""Time a module of the stock ``boltz`` package on given weights: run by the interpreter of an environment that has it.

    python stock.py IN.pt OUT.pt

IN.pt holds ``op``, ``state``, ``n``, ``depth``, ``widths``, ``repeats``, ``threads`` and ``dtype``; OUT.pt gets the
figures.
"""

from __future__ import annotations

import sys
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

from cpfold_train.bench.measure import measure

CASES = {
    "triangle_multiplication": (
        lambda w: TriangleMultiplicationOutgoing(w["token_z"]), lambda f, x: (f(x["z"], x["pair_mask"]),)),
    "triangle_attention_start": (
        lambda w: TriangleAttention(w["token_z"], 32, 4), lambda f, x: (f(x["z"], x["pair_mask"]),)),
    "triangle_attention_end": (
        lambda w: TriangleAttention(w["token_z"], 32, 4, starting=False), lambda f, x: (f(x["z"], x["pair_mask"]),)),
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
        lambda f, x: f(x["z"], x["m"], x["pair_mask"], x["msa_mask"])),
    "pairformer_block": (
        lambda w: PairformerLayer(w["token_s"], w["token_z"], 16, 0.0, v2=True),
        lambda f, x: f(x["s"], x["z"], x["mask"], x["pair_mask"])),
}  # fmt: skip


def main(source: str, target: str) -> None:
    """Build, load, time."""
    given = torch.load(source, weights_only=True)
    torch.set_num_threads(given["threads"])
    build, call = CASES[given["op"]]
    module = build(given["widths"]).train()
    module.load_state_dict(given["state"], strict=True)
    module.to(given["dtype"])
    # As on our ranks, there is room for them before the first step.
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    n, depth, dtype, widths = given["n"], given["depth"], given["dtype"], given["widths"]
    x = {
        "s": torch.randn(1, n, widths["token_s"], dtype=dtype, requires_grad=True),
        "z": torch.randn(1, n, n, widths["token_z"], dtype=dtype, requires_grad=True),
        "m": torch.randn(1, depth, n, widths["msa_s"], dtype=dtype, requires_grad=True),
        "mask": torch.ones(1, n, dtype=dtype),
        "pair_mask": torch.ones(1, n, n, dtype=dtype),
        "msa_mask": torch.ones(1, depth, n, dtype=dtype),
    }
    grads = [torch.randn_like(out) for out in call(module, x)]

    def step() -> None:
        torch.autograd.backward(call(module, x), grads)

    torch.save(asdict(measure(step, given["repeats"], torch.device("cpu"), lambda: None)), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
