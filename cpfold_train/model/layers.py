"""Linear layers with AlphaFold's initialisations, and the transition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpfold_train.ops.recompute import by_rows

BLOCK_ELEMENTS = 1 << 24
"""Hidden activations of a transition held at a time: 64 MiB in fp32."""


def linear(c_in: int, c_out: int, init: str = "lecun", bias: bool = False) -> nn.Linear:
    """A linear layer, without bias unless asked for.

    Args:
        init: ``lecun`` (truncated normal of variance 1 / c_in), ``glorot`` (uniform), ``zero`` (gates, and the last
            layer of a residual update) or ``default`` (torch's own), as AlphaFold 2 supplementary section 1.11.4.
    """
    layer = nn.Linear(c_in, c_out, bias=bias)
    if init == "lecun":
        # 0.8796 is the standard deviation of a unit normal cut at two standard deviations.
        std = c_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    elif init == "glorot":
        nn.init.xavier_uniform_(layer.weight)
    elif init == "zero":
        nn.init.zeros_(layer.weight)
    elif init != "default":
        raise ValueError(f"unknown initialisation {init!r}")
    if bias and init == "zero":
        nn.init.zeros_(layer.bias)
    return layer


class Transition(nn.Module):
    """``fc3(silu(fc1(norm(x))) * fc2(norm(x)))`` (AlphaFold 3, Algorithm 11; ``boltz/model/layers/transition.py``)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(dim, hidden)
        self.fc3 = linear(hidden, dim, "zero")

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, ..., dim) to the same; local. Large inputs are computed, and recomputed, some rows at a time."""
        hidden_per_row = x[:, :1].numel() // x.shape[-1] * self.fc1.out_features
        rows = max(1, BLOCK_ELEMENTS // hidden_per_row)
        return self._update(x) if rows >= x.shape[1] else by_rows(self._update, rows, x)

    def _update(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.fc3(nn.functional.silu(self.fc1(x)) * self.fc2(x))


def without_autocast(x: Tensor) -> torch.autocast:
    """A region in which mixed precision is off, for the parts of the model that must be computed in fp32."""
    return torch.autocast(x.device.type, enabled=False)
