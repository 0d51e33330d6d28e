"""What can be found wrong with ``trainer.precision`` before anything is started."""

from __future__ import annotations

from cpfold_train.config.schema import TrainerConfig
from cpfold_train.errors import ConfigError

IN_BF16 = ("bf16-mixed", "bf16-true", "transformer-engine")
"""Those in which attention gets bf16."""


def check_precision(config: TrainerConfig) -> None:
    """Raise ConfigError for fp8 where it cannot run."""
    if config.precision == "transformer-engine":
        _require_fp8(config.accelerator)


def _require_fp8(accelerator: str) -> None:
    import torch

    if accelerator == "cpu" or not torch.cuda.is_available():
        raise ConfigError(
            "trainer.precision=transformer-engine needs NVIDIA GPUs: type trainer.accelerator=gpu on a machine that "
            "has them, or trainer.precision=bf16-mixed"
        )
    if torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            f"trainer.precision=transformer-engine needs GPUs with fp8, which {torch.cuda.get_device_name()} has not: "
            "type trainer.precision=bf16-mixed"
        )
    try:
        # The package imports without its CUDA part, and then fails in ways of its own.
        import transformer_engine.pytorch  # noqa: F401
        from transformer_engine.common.recipe import Float8CurrentScaling  # noqa: F401
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"trainer.precision=transformer-engine cannot load transformer_engine ({first_line}): type "
            "pip install -e '.[te]', or trainer.precision=bf16-mixed"
        ) from error
