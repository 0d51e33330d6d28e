"""What can be found wrong with a configuration before anything is started."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cpfold_train.data.crop import CROPS
from cpfold_train.data.features import NUM_BINS
from cpfold_train.data.shards import open_shards
from cpfold_train.errors import ConfigError
from cpfold_train.ops.biased_attention import KERNELS
from cpfold_train.parallel.cost import ALGORITHMS
from cpfold_train.training.config import TrainConfig

PRECISIONS = ("32-true", "bf16-mixed", "64-true")
"""Parameters in bf16 would round distances and the single track; fp16 overflows in the pair stack."""


def check(config: TrainConfig) -> None:
    """Raise ConfigError or DataError, one sentence that says what to type instead."""
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={config.ckpt_path} does not exist: type the path of a .ckpt file or leave it out")
    for name, value, least in (
        ("crop_size", config.crop_size, 1),
        ("batch_size", config.batch_size, 1),
        ("data.max_msa_rows", config.data.max_msa_rows, 1),
        ("data.num_workers", config.data.num_workers, 0),
        ("trainer.log_every_n_steps", config.trainer.log_every_n_steps, 1),
        ("checkpoint.every_n_steps", config.checkpoint.every_n_steps, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} is too small: type {name}={least} or more")
    _one_of("cp.algorithm", config.cp.algorithm, ALGORITHMS)
    _one_of("kernels", config.kernels, KERNELS)
    if config.kernels == "cuequivariance":
        _require_cuequivariance(config)
    _one_of("data.crop", config.data.crop, tuple(CROPS))
    _one_of("trainer.precision", str(config.trainer.precision), PRECISIONS)
    _one_of("model.num_bins", config.model.num_bins, (NUM_BINS,))
    if config.model.token_s % config.model.pairformer.num_heads:
        heads = config.model.pairformer.num_heads
        raise ConfigError(
            f"model.token_s={config.model.token_s} does not divide into {heads} heads: "
            f"type model.token_s={heads * -(-config.model.token_s // heads)}"
        )
    if config.cp.timeout_s <= 0:
        raise ConfigError(f"cp.timeout_s={config.cp.timeout_s} leaves no time: type a number of seconds above 0")
    open_shards(config.data.train)
    if config.data.val:
        open_shards(config.data.val)
    if config.wandb.enabled:
        from cpfold_train.training.dashboard import require_wandb

        require_wandb()


def _require_cuequivariance(config: TrainConfig) -> None:
    """Raise ConfigError where its kernels cannot run: they are for GPUs and have no backward pass in full fp32."""
    if find_spec("cuequivariance_torch") is None:
        raise ConfigError(
            "kernels=cuequivariance needs the cuequivariance_torch package: type pip install -e '.[cuequivariance]', "
            "or kernels=torch"
        )
    if config.trainer.accelerator == "cpu":
        raise ConfigError("kernels=cuequivariance needs GPUs: type trainer.accelerator=gpu, or kernels=torch")
    if str(config.trainer.precision) != "bf16-mixed":
        raise ConfigError(
            f"kernels=cuequivariance does not train in trainer.precision={config.trainer.precision}: "
            "type trainer.precision=bf16-mixed, or kernels=torch"
        )


def _one_of(name: str, value: str | int, known: tuple[str | int, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value} is not supported: type {name}=" + f" or {name}=".join(map(str, known)))
