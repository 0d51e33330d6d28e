"""Ops of the benchmark that the trunk consists of; the stock package has them too."""

from __future__ import annotations

from torch import Tensor, nn

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
from cpfold_train.simulate.bench.case import BenchCase, Inputs


def _msa_block(module: nn.Module, x: Inputs, cp: ContextParallel) -> tuple[Tensor, ...]:
    return module(x["z"], x["m"], x["token_pad_mask"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp, None, None)


TRUNK = {
    "triangle_multiplication": BenchCase(
        lambda c: TriangleMultiplicationOutgoing(c.token_z),
        ("z",),
        lambda f, x, cp: (f(x["z"], pair_mask(x["token_pad_mask"], cp.grid), cp),),
    ),
    "triangle_attention_start": BenchCase(
        lambda c: TriangleAttentionStartingNode(
            c.token_z, c.pairformer.pairwise_head_width, c.pairformer.pairwise_num_heads
        ),
        ("z",),
        lambda f, x, cp: (f(x["z"], x["token_pad_mask"], cp),),
    ),
    "triangle_attention_end": BenchCase(
        lambda c: TriangleAttentionEndingNode(
            c.token_z, c.pairformer.pairwise_head_width, c.pairformer.pairwise_num_heads
        ),
        ("z",),
        lambda f, x, cp: (f(x["z"], x["token_pad_mask"], cp),),
    ),
    "outer_product_mean": BenchCase(
        lambda c: OuterProductMean(c.msa.msa_s, c.token_z),
        ("m",),
        lambda f, x, cp: (f(x["m"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp),),
    ),
    "pair_weighted_averaging": BenchCase(
        lambda c: PairWeightedAveraging(c.msa.msa_s, c.token_z),
        ("m", "z"),
        lambda f, x, cp: (f(x["m"], x["z"], x["token_pad_mask"], cp),),
    ),
    "attention_pair_bias": BenchCase(
        lambda c: AttentionPairBias(c.token_s, c.token_z, c.pairformer.num_heads),
        ("s", "z"),
        lambda f, x, cp: (all_tokens(f(x["s"], x["z"], x["token_pad_mask"], cp), cp),),
    ),
    "transition": BenchCase(
        lambda c: Transition(c.token_z, 4 * c.token_z), ("z",), lambda f, x, cp: (f(x["z"], cp.kernels),)
    ),
    "msa_block": BenchCase(lambda c: MSALayer(c.msa, c.token_z), ("m", "z"), _msa_block),
    "pairformer_block": BenchCase(
        lambda c: PairformerLayer(
            c.token_s,
            c.token_z,
            c.pairformer.num_heads,
            c.pairformer.pairwise_head_width,
            c.pairformer.pairwise_num_heads,
        ),
        ("s", "z"),
        lambda f, x, cp: f(x["s"], x["z"], x["token_pad_mask"], cp, None),
    ),
}
