"""AdamW and AlphaFold 3's learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NO_DECAY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding)


def equal_rates(name: str) -> float:
    """1: every parameter learns at the same rate."""
    return 1.0


def parameter_groups(
    model: nn.Module, weight_decay: float, rate_factor: Callable[[str], float] = equal_rates
) -> list[dict]:
    """Groups of the trainable parameters, each with its ``factor`` on the learning rate, highest first.

    Of each factor there are the decayed matrices, and the norms, embeddings, biases and other vectors, which have no
    decay. A parameter belongs to the module that owns it, so the choice goes by type and shape and not by name.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                decayed = parameter.ndim > 1 and not isinstance(module, _NO_DECAY)
                groups.setdefault((rate_factor(name), decayed), []).append(parameter)
    return [
        {"params": groups[factor, decayed], "weight_decay": weight_decay if decayed else 0.0, "factor": factor}
        for factor, decayed in sorted(groups, reverse=True)
    ]


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
    rate_factor: Callable[[str], float] = equal_rates,
) -> tuple[AdamW, LambdaLR]:
    """The optimizer and its scheduler, which is to be stepped once an optimizer step.

    ``factor`` is that of a step, ``rate_factor`` that of a parameter by its name in the model.
    """
    groups = parameter_groups(model, weight_decay, rate_factor)
    for group in groups:
        group["lr"] = lr * group["factor"]
    # On GPUs all weights of a group are moved by a few launches.
    fused = any(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    optimizer = AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    return optimizer, LambdaLR(optimizer, factor)


def base_rate(optimizer: Optimizer) -> float:
    """The learning rate at this step of a parameter whose factor is 1."""
    group = optimizer.param_groups[0]
    # A checkpoint of an earlier version has no factors: all of them were 1.
    return group["lr"] / group.get("factor", 1.0)
