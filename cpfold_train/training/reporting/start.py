"""What a run is, told once before its first validation or step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from cpfold_train.config.memory_default import between_blocks_bytes
from cpfold_train.config.schema import DataConfig, TrainConfig
from cpfold_train.config.sources import crop_kinds, training_sources, validation_source
from cpfold_train.data.stream.sampling import Source
from cpfold_train.data.stream.shards import read_indices
from cpfold_train.reports.shell import shown
from cpfold_train.tables import make_block, make_console
from cpfold_train.training.reporting.progress import total_steps


class StartBlock(Callback):
    """Prints, on the first rank, where the run is, what it trains on what, and how.

    Args:
        config: of the run.
        run_dir: of the run.
    """

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._told = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that resumes makes no validation first.
        self._tell(trainer, pl_module)

    def _tell(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._told or not trainer.is_global_zero:
            return
        self._told = True
        make_console().print(make_block(rows_of(self._config, self._run_dir, trainer, pl_module)))
        # What is piped into a file is read there while the run goes.
        sys.stdout.flush()


def rows_of(config: TrainConfig, run_dir: Path, trainer: Trainer, pl_module: LightningModule) -> list[tuple[str, str]]:
    """Name and text of each line, once weights, optimizer and loops are in place."""
    strategy = trainer.strategy
    samples, data = describe_data(config)
    batches = -(-samples // (strategy.grid.dp * config.batch_size))
    weights = config.ckpt_path or config.model.init_from
    trained, model = describe_model(pl_module.model, pl_module.trains_confidence)
    return [
        ("run directory", shown(run_dir)),
        ("model", model),
        *([("weights from", f"{shown(Path(weights))}{', resumed' if config.ckpt_path else ''}")] if weights else []),
        *data,
        ("ranks", f"{strategy.grid.world_size} on {trainer.num_nodes} machine{'s' * (trainer.num_nodes > 1)}"
                  f" ({strategy.root_device.type}): grid {strategy.grid}, dp {strategy.grid.dp}"),
        ("precision", f"{config.trainer.precision}, kernels {strategy.kernels.name}"),
        ("steps", describe_steps(config, trainer, batches)),
        ("memory", describe_memory(config, strategy.grid, trained, pl_module.model)),
        *dashboards(run_dir, trainer.loggers),
    ]  # fmt: skip


def describe_model(model: nn.Module, trains_confidence: bool) -> tuple[int, str]:
    """Trained parameters, and a sentence on all of them."""
    counts = {"trained": 0, "LoRA": 0, "frozen": 0, "without a loss": 0}
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        if parameter.requires_grad and ".lora_" in name:
            kind = "LoRA"
        if name.startswith("confidence_module.") and not trains_confidence:
            kind = "without a loss"
        counts[kind] += parameter.numel()
    total = sum(counts.values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return counts["trained"] + counts["LoRA"], f"{total:,} parameters: {told}"


def describe_data(config: TrainConfig) -> tuple[int, list[tuple[str, str]]]:
    """Samples of an epoch, and lines on training, crops and validation."""
    data = config.data
    sources = training_sources(data)
    tokens = [_tokens(source) for source in sources]
    everything = np.concatenate(tokens)
    samples = data.samples_per_epoch or len(everything)
    drawn = f", {samples} drawn an epoch" if data.samples_per_epoch else ""
    sets = f"{len(sources)} sets, " if len(sources) > 1 else ""
    cut = int((everything > config.crop_size).sum())
    later = "".join(f", {size} from step {step} on" for step, size in (data.crop_schedule or {}).items())
    return samples, [
        ("data", f"{sets}{_sizes(everything)}{drawn}"),
        ("crops", f"{config.crop_size} tokens{later} ({_kinds(data)}); {cut} samples are larger"),
        ("validation", f"{_sizes(_tokens(validation_source(data)))}{_times(config)}" if data.val else "none"),
    ]


def describe_steps(config: TrainConfig, trainer: Trainer, batches: int) -> str:
    """How many steps there are, from which one the run goes on, and of how many samples they are.

    Args:
        config: of the run.
        trainer: with the limits and the step.
        batches: of an epoch, before ``trainer.limit_train_batches``.
    """
    limit = config.trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, batches if limit is None else limit)
    total, t = total_steps(trainer, batches), config.trainer
    until = "without end" if total is None else f"{total}"
    if t.max_time is not None:
        until = f"until {t.max_time}" if total is None else f"{total} or until {t.max_time}"
    if trainer.global_step:
        until += f", goes on from step {trainer.global_step}"
    samples, steps = (
        config.batch_size * t.accumulate_grad_batches * trainer.strategy.grid.dp,
        -(-batches // t.accumulate_grad_batches),
    )
    return f"{until}; {samples} sample{'s' * (samples > 1)} a step, {steps} steps an epoch"


def describe_memory(config: TrainConfig, grid: Any, trained: int, model: nn.Module) -> str:
    """What a rank holds between the blocks of a step, by sizes alone; ``plan`` traces the rest."""
    width = 8 if str(config.trainer.precision) == "64-true" else 4
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # Weights, gradients, two moments, and the average.
    copies = 4 + bool(config.optim.ema_decay)
    held = width * (copies * trained + frozen) / (grid.world_size if config.parallel.fsdp else 1)
    options = [name for name in ("recompute", "keep_attention", "offload") if getattr(config.memory, name)]
    kept = f", {_mib(between_blocks_bytes(config, grid))} of pairs between blocks" if config.memory.recompute else ""
    return f"a rank {_mib(held)} of weights and optimizer{kept}; {', '.join(options) or 'nothing recomputed'}"


def dashboards(run_dir: Path, loggers: list[Any]) -> list[tuple[str, str]]:
    """Where the metrics can be followed."""
    found = [("metrics", shown(run_dir / "metrics.csv"))]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            # W&B warns where the address of a run that has none is asked for.
            found.append(("W&B", f"offline: wandb sync {shown(Path(run.dir).parent)}" if run.offline else run.url))
    return found


def _tokens(source: Source) -> np.ndarray:
    return np.concatenate([index["tokens"] for _, index in read_indices(source.shards)])


def _sizes(tokens: np.ndarray) -> str:
    if len(tokens) == 1:
        return f"1 sample of {tokens[0]:,} tokens"
    return f"{len(tokens):,} samples of {tokens.min():,} to {tokens.max():,} tokens, {tokens.sum():,} in all"


def _times(config: TrainConfig) -> str:
    """When validation is made."""
    trainer = config.trainer
    if trainer.limit_val_batches == 0:
        return ", not used: trainer.limit_val_batches=0"
    # A run that resumes makes none first.
    times = ["before the first step"] if trainer.num_sanity_val_steps and not config.ckpt_path else []
    every = trainer.val_check_interval
    if isinstance(every, int) and trainer.check_val_every_n_epoch is None:
        times.append(f"every {every} batches")
    return f"; {' and '.join(times)}" if times else ""


def _kinds(data: DataConfig) -> str:
    kinds = crop_kinds(data.crop)
    return " ".join(f"{kind} {weight:g}" for kind, weight in kinds.items()) if len(kinds) > 1 else next(iter(kinds))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
