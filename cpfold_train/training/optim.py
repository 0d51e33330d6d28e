"""AdamW and AlphaFold 3's learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

_NO_DECAY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: decayed matrices, and norms, biases and embeddings without decay.

    A parameter belongs to the module that owns it, so the choice goes by type and not by name.
    """
    decayed, plain = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                exempt = isinstance(module, _NO_DECAY) or name == "bias"
                (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def warmup_then_steps(warmup_steps: int, decay: float, decay_every: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at a step counted from 0 (AlphaFold 3, supplement 5.4).

    Linear up to 1 at step ``warmup_steps - 1``, so that already the first step moves the weights; then multiplied by
    ``decay`` every ``decay_every`` steps.
    """

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps)) * decay ** (step // decay_every)

    return factor


def adamw_with_schedule(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: Callable[[int], float],
) -> tuple[AdamW, LambdaLR]:
    """The optimizer and its scheduler, which is to be stepped once an optimizer step."""
    optimizer = AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)
    return optimizer, LambdaLR(optimizer, factor)
