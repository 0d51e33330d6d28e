"""What can be found wrong with a configuration before anything is started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from cpfold_train.config.check_bounds import check_bounds
from cpfold_train.config.check_checkpoint import check_checkpoints
from cpfold_train.config.check_finetune import check_finetune
from cpfold_train.config.check_precision import IN_BF16, check_precision
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.sources import training_sources, validation_source
from cpfold_train.config.world import device_here
from cpfold_train.data.features.tokens import NUM_BINS
from cpfold_train.data.stream.sampling import Source, open_source
from cpfold_train.errors import ConfigError
from cpfold_train.kernels.choice import INSTALL, PACKAGES, is_installed


def check(config: TrainConfig) -> None:
    """Raise ConfigError or DataError, one sentence that says what to type instead. Shards are not looked for."""
    check_checkpoints(config.ckpt_path, config.model.init_from, config.parallel.fsdp)
    check_bounds(config)
    if config.memory.keep_attention and not config.memory.recompute:
        raise ConfigError("memory.keep_attention=true is for blocks that are recomputed: type memory.recompute=true")
    if config.memory.keep_attention and config.kernels == "cuequivariance":
        raise ConfigError(
            "memory.keep_attention=true is for attention of this project, and kernels=cuequivariance is another: type "
            "kernels=triton or memory.keep_attention=false"
        )
    if config.memory.offload and not config.memory.recompute:
        raise ConfigError("memory.offload=true is for what lies between recomputed blocks: type memory.recompute=true")
    if config.kernels in ("triton", "cuequivariance"):
        _require_installed(config)
    check_kernels(config)
    if config.compile:
        _require_compiler(config)
    check_precision(config.trainer)
    if config.model.num_bins != NUM_BINS:
        raise ConfigError(f"model.num_bins={config.model.num_bins} is not supported: type model.num_bins={NUM_BINS}")
    atoms = config.model.atoms
    _divides("model.token_s", config.model.token_s, config.model.pairformer.num_heads)
    _divides("model.token_s", config.model.token_s, config.model.confidence.pairformer.num_heads)
    _divides("model.atoms.atom_s", atoms.atom_s, atoms.atom_encoder_heads)
    _divides("model.atoms.atom_s", atoms.atom_s, atoms.atom_decoder_heads)
    if config.faults.memory_snapshot and device_here(config.trainer.accelerator) != "gpu":
        raise ConfigError(
            f"faults.memory_snapshot=true is for a GPU's memory, and trainer.accelerator={config.trainer.accelerator} "
            "finds none here: type faults.memory_snapshot=false"
        )
    drawn = config.data.augmentation
    if max(drawn.contact, drawn.pocket) == 1:
        raise ConfigError(
            "data.augmentation.contact and data.augmentation.pocket are also how likely another one follows, and with "
            "1 there would be no end: type 0.9 or less"
        )
    check_finetune(config)
    _crop_schedule(config.data.crop_schedule)
    _profiled_steps(config.profile.steps)
    if config.wandb.enabled and wandb_switched_off() is None:
        _require_wandb()


def count_samples(config: TrainConfig) -> tuple[int, int]:
    """Samples of all training sets and of validation, for :func:`cpfold_train.config.check_batches.check_batches`.

    Raises:
        ConfigError, DataError: there are no such shards, or they are damaged.
    """
    training = sum(_samples(source) for source in training_sources(config.data))
    return training, _samples(validation_source(config.data)) if config.data.val else 0


def _samples(source: Source) -> int:
    return int(open_source(source).first[-1])


def wandb_switched_off(env: Mapping[str, str] = os.environ) -> str | None:
    """The variable of W&B that switches it off, as it is set."""
    if env.get("WANDB_MODE") == "disabled":
        return "WANDB_MODE=disabled"
    value = env.get("WANDB_DISABLED", "")
    return f"WANDB_DISABLED={value}" if value.lower() in ("1", "true", "yes", "on", "y", "t") else None


def _require_wandb() -> None:
    if find_spec("wandb") is None:
        raise ConfigError("wandb.enabled=true needs the wandb package: type pip install -e '.[wandb]'")


def _crop_schedule(schedule: object) -> None:
    """Raise ConfigError unless it is None or maps steps to sizes. The schema cannot: Hydra sets no new key in one."""
    if schedule is None:
        return
    sizes = schedule.items() if isinstance(schedule, dict) else [(schedule, None)]
    for step, size in sizes:
        if type(step) is not int or type(size) is not int or step < 0 or size < 1:
            raise ConfigError(
                f"data.crop_schedule={schedule} does not say from which step on which size holds: type whole numbers, "
                "as data.crop_schedule={1000: 768, 5000: 3072}; crop_size says what holds before"
            )


def _profiled_steps(steps: Any) -> None:
    """Raise ConfigError unless it is None or a first and a last step."""
    if steps is None:
        return
    valid = isinstance(steps, list) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not valid or not 1 <= steps[0] <= steps[1]:
        raise ConfigError(
            f"profile.steps={steps} is not a first and a last step: type for example profile.steps=[10,12]"
        )


def _require_compiler(config: TrainConfig) -> None:
    """Raise ConfigError where torch.compile finds nothing to compile with."""
    if config.trainer.accelerator == "cpu":
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ConfigError("compile=true needs a C++ compiler on CPU: install g++, or type compile=false")
    elif not is_installed("triton"):
        raise ConfigError("compile=true needs the triton package on GPUs: type pip install triton, or compile=false")


def _require_installed(config: TrainConfig) -> None:
    """Raise ConfigError where kernels that were asked for cannot run on this machine."""
    kernels = config.kernels
    if not is_installed(kernels):
        package, how = PACKAGES[kernels], INSTALL[kernels]
        raise ConfigError(f"kernels={kernels} needs the {package} package: type {how}, or kernels=auto")
    if config.trainer.accelerator == "cpu":
        raise ConfigError(f"kernels={kernels} needs GPUs: type trainer.accelerator=gpu, or kernels=torch")


def check_kernels(config: TrainConfig) -> None:
    """Raise ConfigError for cuEquivariance's kernels in full fp32, where they have no backward pass, and for Triton's
    in fp64, which they do not have."""
    if config.kernels == "triton" and config.trainer.precision == "64-true":
        raise ConfigError("kernels=triton has no fp64: type trainer.precision=32-true, or kernels=torch")
    if config.kernels == "cuequivariance" and config.trainer.precision not in IN_BF16:
        raise ConfigError(
            f"kernels=cuequivariance does not train in trainer.precision={config.trainer.precision}: "
            "type trainer.precision=bf16-mixed, or kernels=torch"
        )


def _divides(name: str, width: int, heads: int) -> None:
    if width % heads:
        enough = heads * -(-width // heads)
        raise ConfigError(f"{name}={width} does not divide into {heads} heads: type {name}={enough}")
