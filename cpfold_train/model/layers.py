"""Linear layers with AlphaFold's initialisations, and the transition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpfold_train.kernels.normed_projection import normed_projection
from cpfold_train.kernels.transition import transition


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

    def forward(self, x: Tensor, kernels: str, residual: bool = False) -> Tensor:
        """(B, rows, ..., dim) to the same, added to ``x`` if ``residual``; local. ``kernels`` are those of
        :func:`~cpfold_train.kernels.transition.transition`."""
        return transition(x, *self.weights(), kernels, residual)

    def weights(self) -> tuple[Tensor, ...]:
        """Those that :func:`~cpfold_train.kernels.transition.transition` takes."""
        return self.norm.weight, self.norm.bias, self.fc1.weight, self.fc2.weight, self.fc3.weight


def normed_linear(x: Tensor, norm: nn.LayerNorm, project: nn.Linear, kernels: str) -> Tensor:
    """``project(norm(x))`` of (B, rows, ..., c), without keeping the norm of a whole tile.

    ``project`` has no bias. The norm is in the dtype of its weights, whatever that of x is. ``kernels`` are those of
    :func:`~cpfold_train.kernels.normed_projection.normed_projection`."""
    return normed_projection(x, norm.weight, norm.bias, project.weight, kernels)


def without_autocast(x: Tensor) -> torch.autocast:
    """A region in which mixed precision is off, for the parts of the model that must be computed in fp32."""
    return torch.autocast(x.device.type, enabled=False)
