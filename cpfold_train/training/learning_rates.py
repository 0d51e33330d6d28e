"""Learning rates by part of the model, as factors on the one of ``optim.lr``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cpfold_train.checkpoints.boltz import boltz_name
from cpfold_train.model.lora import weight_name
from cpfold_train.training.patterns import matching

PAIRFORMER = "pairformer_module"
AFTER = ("distogram_module", "diffusion_conditioning", "structure_module", "bfactor_module", "confidence_module")
"""Modules that work on what the Pairformer returns."""


def learning_rate_factors(model: nn.Module, layer_decay: float, groups: dict[str, float]) -> Callable[[str], float]:
    """Factor of each parameter by its name in the model.

    With n blocks in the Pairformer, block k = 0 ... n - 1 has ``layer_decay ** (n - k)``; what comes after it has 1,
    what comes before it ``layer_decay ** (n + 1)``. This is multiplied by the factor of the last pattern of ``groups``
    that gives the parameter.

    Args:
        model: a :class:`~cpfold_train.model.cofolding.CoFolding`, with or without LoRA.
        layer_decay: factor from one block to the one before it.
        groups: factors by pattern.

    Raises:
        ConfigError: a pattern names nothing.
    """
    names = {name: weight_name(boltz_name(name)) for name, _ in model.named_parameters(remove_duplicate=False)}
    known = sorted(set(names.values()))
    blocks = len({name.split(".")[2] for name in known if name.startswith(f"{PAIRFORMER}.layers.")})
    factors = {name: layer_decay ** _depth(name, blocks) for name in known}
    chosen: dict[str, float] = {}
    for pattern, factor in groups.items():
        chosen |= dict.fromkeys(matching("finetune.lr_groups", pattern, known), factor)
    return lambda name: factors[names[name]] * chosen.get(names[name], 1.0)


def _depth(name: str, blocks: int) -> int:
    """How many blocks a weight lies before the end of the Pairformer."""
    module, _, rest = name.partition(".")
    if module in AFTER:
        return 0
    return blocks - int(rest.split(".")[1]) if module == PAIRFORMER else blocks + 1
