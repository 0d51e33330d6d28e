"""Weights from checkpoints: those of the boltz package, and our own.

A checkpoint of Lightning is a pickle, and those of Boltz-2 hold the objects of OmegaConf in which its settings were
written. Reading them runs no code of the file: tensors, plain values and the types listed here are read, anything else
is refused.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, base, nodes
from torch import Tensor, nn

from cpfold_train.checkpoints.sharded import is_sharded_checkpoint
from cpfold_train.errors import ConfigError
from cpfold_train.model.lora import merged

SAFE_TYPES: list[Any] = [
    *(DictConfig, ListConfig, base.ContainerMetadata, base.Metadata),
    *(nodes.AnyNode, nodes.BooleanNode, nodes.FloatNode, nodes.IntegerNode, nodes.StringNode),
    *(defaultdict, bool, dict, float, int, list, str, tuple),
    (Any, "typing.Any"),
]
"""What the settings in a checkpoint are made of."""

CONSOLIDATE = "python -m cpfold_train consolidate {} OUT.ckpt"
"""What makes one file of a checkpoint of a run with FSDP."""
_TASK, _TRUNK = "model.", "trunk."
_SHOWN = 3


def initialise(model: nn.Module, path: Path, weights: str, skip: Collection[str] = ()) -> None:
    """Copy a checkpoint's weights into a model, all of them or nothing.

    Args:
        model: a :class:`~cpfold_train.model.cofolding.CoFolding`.
        path: checkpoint of the boltz package or of a run of ours.
        weights: ``raw``, those under training and in Boltz-2's release those that the package runs with; or ``ema``,
            their moving average.
        skip: modules under Boltz-2's names, such as ``confidence_module`` or ``pairformer_module.layers.0``, that are
            left out: the model keeps its own weights there, and what the checkpoint has is not read.

    Raises:
        ConfigError: naming the tensors that are missing, unexpected or of another shape.
    """
    given = weights_of(read_checkpoint(path), weights, path)
    own = {boltz_name(name): value for name, value in model.state_dict().items()}
    for module in skip:
        if not any(_within(name, module) for name in (*own, *given)):
            raise ConfigError(
                f"model.init_skip has {module}, which is no module of the model or of {path}: "
                f"their parts are {', '.join(_parts((*own, *given)))}"
            )
    own, given = (
        {name: value for name, value in tensors.items() if not any(_within(name, module) for module in skip)}
        for tensors in (own, given)
    )
    misfits = {
        "missing in the checkpoint": {name: "" for name in own if name not in given},
        "unknown to the model": {name: "" for name in given if name not in own},
        "of another shape": {
            name: f" {_shape(given[name])} in the checkpoint, {_shape(own[name])} in the model"
            for name in own
            if name in given and given[name].shape != own[name].shape
        },
    }
    if any(misfits.values()):
        raise ConfigError(_explain(path, misfits, skip))
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(given[name])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on disk until they are used.

    Raises:
        ConfigError: it is no checkpoint, or holds what could run code.
    """
    if is_sharded_checkpoint(path):
        raise ConfigError(
            f"{path} was written with parallel.fsdp=true: type {CONSOLIDATE.format(path)} and give OUT.ckpt instead"
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: type the path of a .ckpt file")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(path, error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"{path} holds no state_dict: type the path of a checkpoint of Lightning")
    return checkpoint


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read: its types that are not on the list, or torch's first line."""
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError):
        foreign = []
    if foreign:
        return f"it holds objects of {', '.join(sorted(foreign))}, and reading those could run any code"
    return str(error).splitlines()[0]


def weights_of(checkpoint: dict[str, Any], weights: str, path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint under Boltz-2's names, LoRA merged into the weights.

    ``weights`` is one of :data:`cpfold_train.model.config.WEIGHTS`, ``path`` is for errors.

    Raises:
        ConfigError: it has no moving average.
    """
    if "current_model_state" in checkpoint:
        # Ours: state_dict is the average, ready for use.
        state = checkpoint["state_dict" if weights == "ema" else "current_model_state"]
    elif weights == "raw":
        state = checkpoint["state_dict"]
    elif "ema" in checkpoint:
        state = checkpoint["ema"]["ema_weights"]
    else:
        raise ConfigError(f"{path} has no moving average of the weights: ask for the raw ones")
    if lora := (checkpoint.get("hyper_parameters") or {}).get("finetune", {}).get("lora"):
        state = merged(state, lora["alpha"] / lora["rank"])
    return {boltz_name(name.removeprefix(_TASK)): value for name, value in state.items()}


def boltz_name(name: str) -> str:
    """Boltz-2's name of a tensor of our model, where the trunk's modules stand beside the others."""
    return name.removeprefix(_TRUNK)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _parts(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "1"


def _explain(path: Path, misfits: dict[str, dict[str, str]], skip: Collection[str]) -> str:
    lines = [f"{path} does not fit the model, and nothing was read."]
    for what, tensors in misfits.items():
        for part in _parts(tensors):
            names = [name for name in tensors if _within(name, part)]
            shown = "; ".join(f"{name}{tensors[name]}" for name in names[:_SHOWN])
            more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"  {part}: {len(names)} tensors {what}: {shown}{more}")
    parts = sorted({*skip, *(part for tensors in misfits.values() for part in _parts(tensors))})
    lines.append(
        "Give the model the checkpoint's sizes (model=boltz2 has those of the release), "
        f"or leave parts out: model.init_skip=[{','.join(parts)}]"
    )
    return "\n".join(lines)
