"""What of a model is trained: all of it, parts named by pattern, or low-rank products beside frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from cpfold_train.checkpoints.boltz import boltz_name
from cpfold_train.config.schema import FinetuneConfig
from cpfold_train.errors import ConfigError
from cpfold_train.model.lora import add_adapters
from cpfold_train.training.patterns import matching


def choose_trained(model: nn.Module, config: FinetuneConfig, trains_confidence: bool) -> bool:
    """Freeze what is not to be trained and add LoRA where it is asked for.

    Trained is everything; or, where there is ``train`` or LoRA, what ``train`` names. ``freeze`` is taken from that.
    The products of LoRA are trained wherever they are, and the weights beside them are not.

    Args:
        model: a :class:`~cpfold_train.model.cofolding.CoFolding` that has its weights.
        config: the patterns.
        trains_confidence: whether the confidence module has a loss.

    Returns:
        Whether it has one and is trained.

    Raises:
        ConfigError: a pattern names nothing, or nothing is left that has a loss.
    """
    parameters = {boltz_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    layers = {
        boltz_name(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        # Fourier features are drawn once and never trained.
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    adapted = {name: layers[name] for name in _named("finetune.lora.patterns", config.lora.patterns, list(layers))}
    if config.train or adapted:
        named = _named("finetune.train", config.train, list(parameters))
        for p in {*parameters.values()} - {parameters[name] for name in named}:
            p.requires_grad_(False)
    for name in _named("finetune.freeze", config.freeze, list(parameters)):
        parameters[name].requires_grad_(False)
    # A layer may have two names.
    add_adapters({id(layer): layer for layer in adapted.values()}.values(), config.lora.rank, config.lora.alpha)
    trained = {boltz_name(name).partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    _require_loss(trained, trains_confidence)
    return trains_confidence and "confidence_module" in trained


def require_same(config: FinetuneConfig, checkpoint: dict[str, Any]) -> None:
    """Raise ConfigError unless a checkpoint to resume from was written with the same settings.

    Its optimizer has the moments of just those weights, in just those groups.
    """
    now = asdict(config)
    then = (checkpoint.get("hyper_parameters") or {}).get("finetune", asdict(FinetuneConfig()))
    if changed := [f"finetune.{key}" for key in now if now[key] != then.get(key)]:
        raise ConfigError(
            f"ckpt_path was written with other values of {' and '.join(changed)}: type the same as there, or "
            "model.init_from with that path instead of ckpt_path, which starts from its weights with a new optimizer"
        )


def require_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless a checkpoint to resume from has just the weights of the model, in their shapes."""
    for name in sorted(own.keys() | given.keys()):
        shapes = [tuple(state[name].shape) if name in state else "nothing" for state in (own, given)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"ckpt_path was written with another model: {name} is {shapes[1]} there and {shapes[0]} here: type the "
                "sizes that resolved.yaml of that run has, or model.init_from with model.init_skip instead of ckpt_path"
            )


def _named(key: str, patterns: list[str], names: list[str]) -> list[str]:
    return [name for pattern in patterns for name in matching(key, pattern, names)]


def _require_loss(trained: set[str], trains_confidence: bool) -> None:
    if not trained:
        raise ConfigError("finetune.freeze and finetune.train leave nothing to train: type fewer patterns")
    if trained == {"confidence_module"} and not trains_confidence:
        raise ConfigError(
            "only the confidence module is trained, and it has no loss: "
            "type loss.plddt=1e-4 loss.resolved=1e-4 loss.pde=1e-4 loss.pae=1e-4"
        )
