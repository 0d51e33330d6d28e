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
from cpfold_train.training.learning_rates import learning_rate_factors
from cpfold_train.training.optim import parameter_groups
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


def require_same(config: FinetuneConfig, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Raise ConfigError unless the optimizer of a checkpoint to resume from can go on with these settings.

    It has the moments of just the weights that were trained, in groups of equal rates, highest first. The rates
    themselves may change.

    Args:
        config: the settings of now.
        checkpoint: with the settings of then.
        model: a :class:`~cpfold_train.model.cofolding.CoFolding`, with the settings of now.
    """
    now = asdict(config)
    then = asdict(FinetuneConfig()) | (checkpoint.get("hyper_parameters") or {}).get("finetune", {})
    changed = [f"finetune.{key}" for key in now if now[key] != then[key]]
    if changed and set(changed) <= {"finetune.lr_groups", "finetune.layer_decay"}:
        groups = [_groups(model, x["layer_decay"], x["lr_groups"] or {}) for x in (now, then)]
        if groups[0] == groups[1]:
            return
        raise ConfigError(
            f"with other values of {' and '.join(changed)} than in ckpt_path other weights have equal rates, or their "
            "order is another, and its optimizer cannot go on: type other factors of the same weights in this order, "
            "or model.init_from with that path instead of ckpt_path, which starts from its weights with a new optimizer"
        )
    if changed:
        raise ConfigError(
            f"ckpt_path was written with other values of {' and '.join(changed)}: type the same as there, or "
            "model.init_from with that path instead of ckpt_path, which starts from its weights with a new optimizer"
        )


def _groups(model: nn.Module, layer_decay: float, lr_groups: dict[str, float]) -> list[list[str]]:
    """The optimizer's groups of parameters, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, learning_rate_factors(model, layer_decay, lr_groups))
    return [[names[parameter] for parameter in group["params"]] for group in groups]


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
