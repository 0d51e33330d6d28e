"""Ops and blocks of the trunk, and the trunk itself, on two made-up complexes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cpfold_train.model.config import AtomConfig, MemoryConfig, ModelConfig, MSAConfig, PairformerConfig
from cpfold_train.model.msa import MSALayer, OuterProductMean, PairWeightedAveraging
from cpfold_train.model.pair_stack import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
    pair_dropout,
)
from cpfold_train.model.pairformer import AttentionPairBias, PairformerLayer
from cpfold_train.model.trunk import DistogramModule, Trunk
from cpfold_train.ops.attention_pair_bias import all_tokens
from cpfold_train.ops.dropout import row_factors
from cpfold_train.ops.outer_product_mean import pair_counts
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.atoms import atom_features
from cpfold_train.testing.parity import DEPTHS, LENGTHS, Case, cut_features, pad, placed, random, to_device

C_S, C_Z, C_M = 16, 10, 12
N, S, B = max(LENGTHS), max(DEPTHS), len(LENGTHS)
TOKEN_MASK = torch.stack([torch.arange(N) < n for n in LENGTHS]).double()
MSA_MASK = torch.stack([torch.arange(S) < s for s in DEPTHS]).double()[:, :, None] * TOKEN_MASK[:, None]
MSA_MASK[0, 3, 4:7] = 0
INPUTS = {
    "z": (random(B, N, N, C_Z, seed=1), "pair"),
    "s": (random(B, N, C_S, seed=2), "token"),
    "m": (random(B, S, N, C_M, seed=3), "msa"),
    "token_mask": (TOKEN_MASK, "token"),
    "msa_mask": (MSA_MASK, "msa"),
}
MSA = MSAConfig(C_M, 1, 0.15, 0.25, 6, 2)
Inputs = dict[str, Tensor]


def draws(device: torch.device | str = "cpu") -> RandomStreams:
    """Keys of the two complexes."""
    return RandomStreams(torch.tensor([3, 4], device=device))


def multiplication(module: nn.Module, x: Inputs, cp: ContextParallel, algorithm: str) -> Tensor:
    """A triangle multiplication by one of its two ways."""
    cp.algorithm = algorithm if cp.grid.cp_size > 1 else "alltoall"
    return module(x["z"], pair_mask(x["token_mask"], cp.grid), cp)


def attention(module: nn.Module, x: Inputs, cp: ContextParallel, algorithm: str) -> Tensor:
    """A triangle attention by one of its two ways."""
    cp.algorithm = algorithm if cp.grid.cp_size > 1 else "alltoall"
    return module(x["z"], x["token_mask"], cp)


def single_attention(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """Attention with pair bias, gathered."""
    return all_tokens(module(x["s"], x["z"], x["token_mask"], cp), cp)


def averaging(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """Pair-weighted averaging."""
    return module(x["m"], x["z"], x["token_mask"], cp)


def outer_product(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """The outer product mean."""
    return module(x["m"], x["msa_mask"], pair_counts(x["msa_mask"], cp), cp)


def distogram(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """The distogram's logits."""
    return module(x["z"], cp)


def msa_layer(module: nn.Module, x: Inputs, cp: ContextParallel, which: int) -> Tensor:
    """z or m of a block of the MSA module, with dropout."""
    count, own = pair_counts(x["msa_mask"], cp), draws(x["z"].device)
    dropout = pair_dropout(MSA.z_dropout, x["token_mask"].shape[1], own)
    of_msa = row_factors(MSA.msa_dropout, cp.grid.msa_rows(x["m"].shape[1] * cp.grid.rows), own.at("msa"))
    return module(x["z"], x["m"], x["token_mask"], x["msa_mask"], count, cp, dropout, of_msa)[which]


def pairformer_s(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """s of a block of the Pairformer, with dropout."""
    dropout = pair_dropout(0.25, x["token_mask"].shape[1], draws(x["z"].device))
    return module(x["s"], x["z"], x["token_mask"], cp, dropout)[0]


def distogram_of_trunk(module: nn.Module, x: Inputs, cp: ContextParallel) -> Tensor:
    """Logits of a whole trunk: dropout on, one recycling, blocks recomputed."""
    device = cp.mesh.device_type
    feats = to_device(features(cp.grid), device)
    return module(feats, cp, recycling_steps=1, draws=draws(device))["pdistogram"].to_local()


def double(cls: type[nn.Module], *args) -> nn.Module:
    """A module in fp64."""
    return cls(*args).double()


def small_trunk(memory: MemoryConfig) -> Trunk:
    """A trunk with a block of each kind, in fp64."""
    config = ModelConfig(C_S, C_Z, 8, 1, MSA, PairformerConfig(1, 4, 0.25, 6, 2), AtomConfig(8, 4, 2, 2))
    return Trunk(config, memory).double()


def features(grid) -> dict[str, torch.Tensor]:
    """A batch of two made-up complexes as one rank gets it, with every input that the trunk reads."""
    draw = torch.Generator().manual_seed(7)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=draw)

    def numbers(*shape):
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    index = torch.arange(N).expand(B, N)
    whole = {
        "token_index": index, "residue_index": index // 2, "asym_id": index // 5, "entity_id": index // 10,
        "sym_id": index // 5 % 2, "mol_type": integers(4, B, N), "method_feature": integers(12, B, N),
        "modified": integers(2, B, N), "token_pad_mask": TOKEN_MASK, "token_disto_mask": TOKEN_MASK * (index != 4),
        "cyclic_period": torch.where(index // 5 == 1, 5.0, 0.0).double(), "deletion_mean": numbers(B, N),
        "res_type": torch.nn.functional.one_hot(integers(33, B, N), 33).double(), "profile": numbers(B, N, 33),
        "token_bonds": integers(2, B, N, N, 1).double(), "type_bonds": integers(7, B, N, N),
        "contact_conditioning": integers(5, B, N, N), "contact_threshold": 4 + 16 * numbers(B, N, N),
        "disto_target": integers(8, B, N, N, 2),
        "msa": integers(33, B, S, N), "msa_mask": MSA_MASK, "has_deletion": integers(2, B, S, N).double(),
        "deletion_value": numbers(B, S, N), "msa_paired": integers(2, B, S, N).double(),
    }  # fmt: skip
    # The templates' dims are swapped, so that tokens come first.
    templates = {name: pad(x, "token", grid).transpose(1, 2) for name, x in template_features().items()}
    return {**cut_features(whole, grid), **templates, **atom_features(grid)}


def template_features() -> dict[str, torch.Tensor]:
    """Two templates of one made-up complex and one of the other, tokens in dim 1: each shows some of the tokens."""
    index, t = torch.arange(N)[:, None], 2
    shown = torch.stack([(index % 4 != 3).expand(N, t), (index < 8) & (torch.arange(t) == 0)]).double()
    known = shown * (torch.stack([index, index + 1]) % 5 != 0)
    rotation = torch.linalg.qr(random(B, N, t, 3, 3, seed=21))[0]
    origin = 9 * random(B, N, t, 3, seed=22)
    return {
        "template_restype": (torch.stack([index, 3 * index]) % 33 * shown).long(),
        "template_frame_rot": rotation * shown[..., None, None],
        "template_frame_t": origin * known[..., None],
        "template_ca": origin * shown[..., None],
        "template_cb": (origin + random(B, N, t, 3, seed=23)) * shown[..., None],
        "template_mask_cb": shown,
        "template_mask_frame": known,
        "template_mask": shown,
        "visibility_ids": torch.where(shown > 0, 1, -1 - index // 5),
    }


def _case(build, call, names: tuple[str, ...], out_placement: str, tolerance: float = 1e-9) -> Case:
    return Case(build, call, *placed(INPUTS, names), out_placement, tolerance)


TRUNK = {
    "attention pair bias": _case(
        partial(double, AttentionPairBias, C_S, C_Z, 4), single_attention, ("s", "z", "token_mask"), "token"),
    "pair weighted averaging": _case(
        partial(double, PairWeightedAveraging, C_M, C_Z), averaging, ("m", "z", "token_mask"), "msa"),
    "outer product mean": _case(
        partial(double, OuterProductMean, C_M, C_Z), outer_product, ("m", "msa_mask"), "pair"),
    "distogram head": _case(partial(double, DistogramModule, C_Z, 8), distogram, ("z",), "pair"),
    "msa block, z": _case(
        partial(double, MSALayer, MSA, C_Z), partial(msa_layer, which=0), ("m", "z", "token_mask", "msa_mask"), "pair"),
    "msa block, m": _case(
        partial(double, MSALayer, MSA, C_Z), partial(msa_layer, which=1), ("m", "z", "token_mask", "msa_mask"), "msa"),
    "pairformer block": _case(
        partial(double, PairformerLayer, C_S, C_Z, 4, 6, 2), pairformer_s, ("s", "z", "token_mask"), "token"),
    "trunk": _case(partial(small_trunk, MemoryConfig()), distogram_of_trunk, (), "pair", 1e-7),
}  # fmt: skip
for _way in ("alltoall", "ring"):
    for _cls in (TriangleMultiplicationOutgoing, TriangleMultiplicationIncoming):
        _call = partial(multiplication, algorithm=_way)
        TRUNK[f"{_cls.__name__}, {_way}"] = _case(partial(double, _cls, C_Z), _call, ("z", "token_mask"), "pair")
    for _cls in (TriangleAttentionStartingNode, TriangleAttentionEndingNode):
        _call = partial(attention, algorithm=_way)
        TRUNK[f"{_cls.__name__}, {_way}"] = _case(partial(double, _cls, C_Z, 6, 2), _call, ("z", "token_mask"), "pair")
