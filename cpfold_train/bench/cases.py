"""The ops that can be timed, at Boltz-2's widths: modules, inputs and how to call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpfold_train.model.config import ModelConfig
from cpfold_train.model.layers import Transition
from cpfold_train.model.msa import MSALayer, OuterProductMean, PairWeightedAveraging
from cpfold_train.model.pair_stack import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationOutgoing,
)
from cpfold_train.model.pairformer import AttentionPairBias, PairformerLayer
from cpfold_train.ops.attention_pair_bias import all_tokens
from cpfold_train.ops.outer_product_mean import pair_counts
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op: how to build it, which inputs it takes and how it is called."""

    build: Callable[[ModelConfig], nn.Module]
    inputs: tuple[str, ...]
    call: Callable[[nn.Module, Inputs, ContextParallel], tuple[Tensor, ...]]


def _msa_block(module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor, ...]:
    return module(x["z"], x["m"], x["token_mask"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp, None)


CASES = {
    "triangle_multiplication": Case(
        lambda c: TriangleMultiplicationOutgoing(c.token_z),
        ("z",),
        lambda f, x, cp: (f(x["z"], pair_mask(x["token_mask"], cp.grid), cp),),
    ),
    "triangle_attention_start": Case(
        lambda c: TriangleAttentionStartingNode(
            c.token_z, c.pairformer.pairwise_head_width, c.pairformer.pairwise_num_heads
        ),
        ("z",),
        lambda f, x, cp: (f(x["z"], x["token_mask"], cp),),
    ),
    "triangle_attention_end": Case(
        lambda c: TriangleAttentionEndingNode(
            c.token_z, c.pairformer.pairwise_head_width, c.pairformer.pairwise_num_heads
        ),
        ("z",),
        lambda f, x, cp: (f(x["z"], x["token_mask"], cp),),
    ),
    "outer_product_mean": Case(
        lambda c: OuterProductMean(c.msa.msa_s, c.token_z),
        ("m",),
        lambda f, x, cp: (f(x["m"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp),),
    ),
    "pair_weighted_averaging": Case(
        lambda c: PairWeightedAveraging(c.msa.msa_s, c.token_z),
        ("m", "z"),
        lambda f, x, cp: (f(x["m"], x["z"], x["token_mask"], cp),),
    ),
    "attention_pair_bias": Case(
        lambda c: AttentionPairBias(c.token_s, c.token_z, c.pairformer.num_heads),
        ("s", "z"),
        lambda f, x, cp: (all_tokens(f(x["s"], x["z"], x["token_mask"], cp), cp),),
    ),
    "transition": Case(lambda c: Transition(c.token_z, 4 * c.token_z), ("z",), lambda f, x, cp: (f(x["z"]),)),
    "msa_block": Case(lambda c: MSALayer(c.msa, c.token_z), ("m", "z"), _msa_block),
    "pairformer_block": Case(
        lambda c: PairformerLayer(
            c.token_s,
            c.token_z,
            c.pairformer.num_heads,
            0.0,
            c.pairformer.pairwise_head_width,
            c.pairformer.pairwise_num_heads,
        ),
        ("s", "z"),
        lambda f, x, cp: f(x["s"], x["z"], x["token_mask"], cp, None),
    ),
}


def make_inputs(
    names: tuple[str, ...],
    config: ModelConfig,
    n: int,
    depth: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """This rank's random inputs: the named ones with gradients, and the masks.

    Args:
        names: of ``s`` (1, N, token_s), ``z`` (1, N/R, N/C, token_z), ``m`` (1, S/R, N/C, msa_s).
        n: tokens, a multiple of R * C.
        depth: MSA sequences, a multiple of R.
    """
    rows, cols = n // grid.rows, n // grid.cols
    shapes = {
        "s": (1, n, config.token_s),
        "z": (1, rows, cols, config.token_z),
        "m": (1, depth // grid.rows, cols, config.msa.msa_s),
    }
    inputs = {name: torch.randn(shapes[name], dtype=dtype, device=device, requires_grad=True) for name in names}
    inputs["token_mask"] = torch.ones(1, n, device=device)
    inputs["msa_mask"] = torch.ones(1, depth // grid.rows, cols, device=device)
    return inputs


def randomise(module: nn.Module) -> None:
    """Small random values for every parameter, so that no part of the backward pass is a multiplication by zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(values + (1.0 if parameter.ndim == 1 else 0.0))
