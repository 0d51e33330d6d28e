"""How wide numbers are in a run: what ``trainer.precision`` becomes in Lightning. docs/precision.md has a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cpfold_train.config.schema import TrainerConfig
from cpfold_train.kernels.linear import linear_by

WIDTHS = 16
"""Transformer Engine multiplies matrices in fp8 whose widths are multiples of this."""
ROWS = 32
"""What the number of rows is padded to: 8 would do in the forward pass, 16 where rows are summed over, 32 for MXFP8."""


def precision_arguments(config: TrainerConfig) -> dict[str, Any]:
    """The arguments of ``lightning.Trainer`` that ``trainer.precision`` stands for."""
    if config.precision == "transformer-engine":
        device = "cpu" if config.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
        return {"precision": None, "plugins": [Fp8Precision(device)]}
    # What bf16-true is beside that, the model does itself.
    return {"precision": "bf16-mixed" if config.precision == "bf16-true" else config.precision}


class Fp8Precision(MixedPrecision):
    """bf16-mixed with the linear layers of :mod:`cpfold_train.kernels.linear` in fp8, by Transformer Engine (not
    measured).

    Lightning's own plugin replaces modules, which would miss the weights that ops take, and in doing so thaws frozen
    layers and flattens norms; and it casts all of the model, fp32 islands included. Here no module changes. Each tensor
    is scaled by its present values: scales of earlier calls, Lightning's default, would mix the cycles of recycling.

    Args:
        device: type of the device, ``cuda`` but in tests.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)
        self._layers: dict[tuple[int, int], nn.Module] = {}

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), self.fp8():
            yield

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Blocks are computed again in the backward pass, in fp8 as before."""
        with self.fp8():
            super().backward(*args, **kwargs)

    @contextmanager
    def fp8(self) -> Iterator[None]:
        """A region in which linear layers under autocast are computed in fp8."""
        from transformer_engine.common.recipe import Float8CurrentScaling
        from transformer_engine.pytorch import autocast

        with autocast(enabled=True, recipe=Float8CurrentScaling()), linear_by(self._linear):
            yield

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        # The fp32 islands of the model are regions without autocast.
        if not torch.is_autocast_enabled(x.device.type) or any(width % WIDTHS for width in weight.shape):
            return F.linear(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        # Rows of zeros add nothing to any gradient.
        rows = F.pad(rows, (0, 0, 0, -count % ROWS))
        out = functional_call(self._layer(*weight.shape), {"weight": weight}, (rows,))
        return out[:count].unflatten(0, x.shape[:-1])

    def _layer(self, c_out: int, c_in: int) -> nn.Module:
        """A layer without weights of its own, nothing but a way to call the package's functions."""
        from transformer_engine.pytorch import Linear

        if (c_out, c_in) not in self._layers:
            self._layers[c_out, c_in] = Linear(c_in, c_out, bias=False, params_dtype=torch.float32, device="meta")
        return self._layers[c_out, c_in]
