"""LoRA: a frozen weight W plus a trained product of low rank, W + alpha / rank B A (Hu et al. 2021).

The product is a parametrization of the weight and not a layer of its own: many weights here are handed to an op as
tensors, past the forward function of their layer, and a layer around them would do nothing. Whoever reads
``layer.weight`` gets the sum, made again at each reading, so that recomputed blocks need nothing special.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cpfold_train.model.layers import without_autocast

_PARAMETRIZED = re.compile(r"(?P<weight>.*)\.parametrizations\.weight\.(?P<part>original|0\.lora_A|0\.lora_B)")


class LowRank(nn.Module):
    """W to W + scale B A, with B zero at first, so that training starts from W.

    Args:
        weight: W (c_out, c_in).
        rank: columns of B and rows of A; no more than W has.
        scale: alpha / rank.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        c_out, c_in = weight.shape
        rank = min(rank, c_out, c_in)
        self.scale = scale
        self.lora_A = nn.Parameter(weight.new_empty(rank, c_in))
        self.lora_B = nn.Parameter(weight.new_zeros(c_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(c_out, c_in), as it is exported: mixed precision would round the product to bf16 before the sum."""
        with without_autocast(weight):
            return _sum(weight, self.lora_A, self.lora_B, self.scale)


def add_adapters(layers: Collection[nn.Linear], rank: int, alpha: float) -> None:
    """Freeze the weights of layers and put trained products beside them."""
    for layer in layers:
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight.detach(), rank, alpha / rank))


def weight_name(name: str) -> str:
    """The name that a parameter's weight has without LoRA: that of W for W, A and B, any other name as it is."""
    found = _PARAMETRIZED.fullmatch(name)
    return f"{found['weight']}.weight" if found else name


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with each W + scale B A under the name of W; what has no LoRA is the same tensor as before."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, x in state.items():
        found = _PARAMETRIZED.fullmatch(name)
        parts.setdefault(weight_name(name), {})[found["part"] if found else "original"] = x
    return {
        name: _sum(x["original"], x["0.lora_A"], x["0.lora_B"], scale) if len(x) > 1 else x["original"]
        for name, x in parts.items()
    }


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, b, a, alpha=scale)
