"""The schema of a run: every key, its type and its meaning. The values people see and edit are in ``conf``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cpfold_train.model.config import MemoryConfig, ModelConfig


@dataclass
class ContextParallelConfig:
    """How one sample is shared.

    ``grid`` is "RxC" or "auto", ``algorithm`` that of the triangle ops, ``timeout_s`` what a rank waits for another.
    """

    grid: str = MISSING
    algorithm: str = MISSING
    timeout_s: float = MISSING


@dataclass
class AugmentationConfig:
    """What is drawn about a training sample beside its crop: :class:`cpfold_train.data.stream.batch.Augmentation`."""

    single_sequence: float = MISSING
    random_depth: bool = MISSING
    random_templates: bool = MISSING
    pocket: float = MISSING
    contact: float = MISSING


@dataclass
class DataConfig:
    """Where the shards are and how they are read; see ``conf/data``.

    An entry of ``train`` is a glob, or a data set: ``shards``, ``weight``, ``sampling`` and ``crop``; ``crop`` is a
    kind or a mapping of kinds to weights, ``crop_schedule`` a mapping of steps to sizes.
    """

    train: list[Any] = MISSING
    val: list[str] = MISSING
    samples_per_epoch: int | None = MISSING
    sampling: str = MISSING
    crop: Any = MISSING
    crop_schedule: Any = MISSING
    max_atoms: int | None = MISSING
    max_msa_rows: int = MISSING
    max_templates: int = MISSING
    buckets: int | None = MISSING
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_bad_share: float = MISSING
    num_workers: int = MISSING


CONFIDENCE = ("plddt", "resolved", "pde", "pae")
"""Losses of the confidence heads, which need sampled structures."""


@dataclass
class LossConfig:
    """Weights of the losses; see ``conf/train.yaml``."""

    diffusion: float = MISSING
    smooth_lddt: float = MISSING
    distogram: float = MISSING
    bfactor: float = MISSING
    plddt: float = MISSING
    resolved: float = MISSING
    pde: float = MISSING
    pae: float = MISSING

    @property
    def of_confidence(self) -> bool:
        """Whether the confidence module has a loss."""
        return any(getattr(self, name) for name in CONFIDENCE)


@dataclass
class DiffusionRunConfig:
    """How often structures are noised in training, and how they are sampled; see ``conf/train.yaml``."""

    multiplicity: int = MISSING
    sampling_steps: int = MISSING
    samples: int = MISSING
    validation_steps: int = MISSING


@dataclass
class OptimConfig:
    """AdamW, its schedule and the moving average of the weights; see ``conf/optim``.

    ``start_step`` is a step of the schedule, "checkpoint" or None.
    """

    lr: float = MISSING
    warmup_steps: int = MISSING
    decay: float = MISSING
    decay_every: int = MISSING
    betas: tuple[float, float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    ema_decay: float = MISSING
    start_step: Any = MISSING


@dataclass
class LoRAConfig:
    """Layers that get a trained product of low rank, by pattern, its rank, and its scale times the rank."""

    patterns: list[str] = field(default_factory=list)
    rank: int = 8
    alpha: float = 16.0


@dataclass
class FinetuneConfig:
    """What is trained, and how fast; see ``conf/train.yaml``. The defaults train everything at one rate.

    Patterns are those of :func:`cpfold_train.training.patterns.matching`. ``lr_groups`` maps them to factors.
    """

    freeze: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    lr_groups: Any = None
    layer_decay: float = 1.0
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class EarlyStopConfig:
    """A validation metric, or None; how many validations it may stay without improvement; the least improvement."""

    monitor: str | None = MISSING
    patience: int = MISSING
    min_delta: float = MISSING


@dataclass
class ModuleStatisticsConfig:
    """``every_n_steps`` optimizer steps between two rows for each module; 0 writes none."""

    every_n_steps: int = MISSING


@dataclass
class CheckpointConfig:
    """``every_n_steps`` optimizer steps between checkpoints; the last one is always written."""

    every_n_steps: int = MISSING


@dataclass
class FaultsConfig:
    """``max_skipped`` of 100 steps in a row may be without a finite loss and gradient; ``memory_snapshot`` has each
    rank write at out of memory what its GPU's memory was used for."""

    max_skipped: int = MISSING
    memory_snapshot: bool = MISSING


@dataclass
class ProfileConfig:
    """``steps``: first and last optimizer step to trace, or None."""

    steps: Any = MISSING


@dataclass
class WandbConfig:
    """Weights & Biases; see ``conf/train.yaml``."""

    enabled: bool = MISSING
    project: str = MISSING
    name: str | None = MISSING
    entity: str | None = MISSING


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer`` under their own names; ``Any`` where Lightning takes several types."""

    accelerator: str = MISSING
    num_nodes: int = MISSING
    precision: Any = MISSING
    fast_dev_run: Any = MISSING
    max_epochs: int | None = MISSING
    min_epochs: int | None = MISSING
    max_steps: int = MISSING
    min_steps: int | None = MISSING
    max_time: Any = MISSING
    limit_train_batches: Any = MISSING
    limit_val_batches: Any = MISSING
    val_check_interval: Any = MISSING
    check_val_every_n_epoch: int | None = MISSING
    num_sanity_val_steps: int | None = MISSING
    log_every_n_steps: int = MISSING
    enable_progress_bar: bool = MISSING
    enable_model_summary: bool = MISSING
    accumulate_grad_batches: int = MISSING
    gradient_clip_val: float | None = MISSING
    gradient_clip_algorithm: str | None = MISSING
    deterministic: Any = MISSING
    benchmark: bool | None = MISSING
    inference_mode: bool = MISSING
    profiler: str | None = MISSING
    detect_anomaly: bool = MISSING


@dataclass
class ParallelConfig:
    """``fsdp``: parameters and optimizer shared out over all ranks."""

    fsdp: bool = MISSING


@dataclass
class TrainConfig:
    """One run; ``kernels`` are those of attention and pair stack, ``compile`` fuses what launches many small ones, and
    ``tf32`` says how exact fp32 matrix products are on GPUs."""

    crop_size: int = MISSING
    batch_size: int = MISSING
    dp: Any = MISSING
    seed: int = MISSING
    ckpt_path: str | None = MISSING
    kernels: str = MISSING
    compile: bool = MISSING
    tf32: bool = MISSING
    cp: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    diffusion: DiffusionRunConfig = field(default_factory=DiffusionRunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    module_statistics: ModuleStatisticsConfig = field(default_factory=ModuleStatisticsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def largest_crop(self) -> int:
        """Most tokens that a sample has in any step."""
        return max([self.crop_size, *(self.data.crop_schedule or {}).values()])
