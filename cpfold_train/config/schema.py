"""The schema of a run: every key, its type, its bounds and its meaning. Default values and texts are in ``conf``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cpfold_train.bounds import (
    above,
    at_least,
    batches,
    below,
    duration,
    from_to,
    key,
    one_of,
    pair,
    switch,
    switch_or_count,
    up_to,
)
from cpfold_train.data.stream.sampling import SAMPLINGS
from cpfold_train.kernels.choice import KERNELS
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.parallel.cost import ALGORITHMS
from cpfold_train.vocabulary import FEATURE_SETS

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "transformer-engine", "64-true")
"""Not fp16: its range ends at 65,504."""


@dataclass
class ContextParallelConfig:
    """How one sample is shared.

    ``grid`` is "RxC" or "auto", ``algorithm`` that of the triangle ops, ``timeout_s`` what a rank waits for another.
    """

    grid: str = MISSING
    algorithm: str = key(one_of(*ALGORITHMS))
    timeout_s: float = key(above(0, "1800"))


@dataclass
class AugmentationConfig:
    """What is drawn about a training sample beside its crop: :class:`cpfold_train.data.stream.batch.Augmentation`."""

    single_sequence: float = key(from_to(0, 1))
    random_depth: bool = MISSING
    random_templates: bool = MISSING
    pocket: float = key(from_to(0, 1))
    contact: float = key(from_to(0, 1))


@dataclass
class DataConfig:
    """Where the shards are and how they are read; see ``conf/data``.

    An entry of ``train`` is a glob, or a data set: ``shards``, ``weight``, ``sampling`` and ``crop``; ``crop`` is a
    kind or a mapping of kinds to weights, ``crop_schedule`` a mapping of steps to sizes.
    """

    train: list[Any] = MISSING
    val: list[str] = MISSING
    samples_per_epoch: int | None = key(at_least(1))
    sampling: str = key(one_of(*SAMPLINGS))
    crop: Any = MISSING
    crop_schedule: Any = MISSING
    max_atoms: int | None = key(at_least(1))
    max_msa_rows: int = key(at_least(1))
    max_templates: int = key(at_least(0))
    features: str = key(one_of(*FEATURE_SETS))
    buckets: int | None = key(at_least(1))
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_bad_share: float = key(from_to(0, 1))
    num_workers: int = key(from_to(0, 256))


CONFIDENCE = ("plddt", "resolved", "pde", "pae")
"""Losses of the confidence heads, which need sampled structures."""


@dataclass
class LossConfig:
    """Weights of the losses; see ``conf/train.yaml``."""

    diffusion: float = key(at_least(0))
    smooth_lddt: float = key(at_least(0))
    distogram: float = key(at_least(0))
    bfactor: float = key(at_least(0))
    plddt: float = key(at_least(0))
    resolved: float = key(at_least(0))
    pde: float = key(at_least(0))
    pae: float = key(at_least(0))

    @property
    def of_confidence(self) -> bool:
        """Whether the confidence module has a loss."""
        return any(getattr(self, name) for name in CONFIDENCE)


@dataclass
class DiffusionRunConfig:
    """How often structures are noised in training, and how they are sampled; see ``conf/train.yaml``."""

    multiplicity: int = key(at_least(1))
    sampling_steps: int = key(at_least(2))
    samples: int = key(at_least(1))
    validation_steps: int = key(at_least(2, or_zero=True))


@dataclass
class OptimConfig:
    """AdamW, its schedule and the moving average of the weights; see ``conf/optim``.

    ``start_step`` is a step of the schedule, "checkpoint" or None.
    """

    lr: float = key(above(0, "1e-4"))
    warmup_steps: int = key(at_least(0))
    decay: float = key(above(0, "0.95"))
    decay_every: int = key(at_least(1))
    betas: tuple[float, float] = key(pair(below(1, "0.9"), "[0.9,0.95]"))
    eps: float = key(above(0, "1e-8"))
    weight_decay: float = key(at_least(0))
    ema_decay: float = key(below(1, "0.999"))
    start_step: Any = MISSING


@dataclass
class LoRAConfig:
    """Layers that get a trained product of low rank, by pattern, its rank, and its scale times the rank."""

    patterns: list[str] = field(default_factory=list)
    rank: int = key(at_least(1), 8)
    alpha: float = key(above(0, "16"), 16.0)


@dataclass
class FinetuneConfig:
    """What is trained, and how fast; see ``conf/train.yaml``. The defaults train everything at one rate.

    Patterns are those of :func:`cpfold_train.training.patterns.matching`. ``lr_groups`` maps them to factors.
    """

    freeze: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    lr_groups: Any = None
    layer_decay: float = key(up_to(1, "0.95"), 1.0)
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class EarlyStopConfig:
    """A validation metric, or None; how many validations it may stay without improvement; the least improvement."""

    monitor: str | None = MISSING
    patience: int = key(at_least(1))
    min_delta: float = key(at_least(0))


@dataclass
class ModuleStatisticsConfig:
    """``every_n_steps`` optimizer steps between two rows for each module; 0 writes none."""

    every_n_steps: int = key(at_least(0))


@dataclass
class CheckpointConfig:
    """``every_n_steps`` optimizer steps between checkpoints; the last one is always written."""

    every_n_steps: int = key(at_least(1))


@dataclass
class FaultsConfig:
    """``max_skipped`` of 100 steps in a row may be without a finite loss and gradient; ``memory_snapshot`` has each
    rank write at out of memory what its GPU's memory was used for."""

    max_skipped: int = key(at_least(0))
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

    accelerator: str = key(one_of("cpu", "gpu", "cuda", "auto"))
    num_nodes: int = key(at_least(1))
    precision: str = key(one_of(*PRECISIONS))
    fast_dev_run: Any = key(switch_or_count())
    max_epochs: int | None = key(at_least(-1))
    min_epochs: int | None = key(at_least(0))
    max_steps: int = key(at_least(-1))
    min_steps: int | None = key(at_least(0))
    max_time: Any = key(duration())
    limit_train_batches: Any = key(batches(1, "100"))
    limit_val_batches: Any = key(batches(0, "10"))
    val_check_interval: Any = key(batches(1, "50"))
    check_val_every_n_epoch: int | None = key(at_least(1))
    num_sanity_val_steps: int | None = key(at_least(-1))
    log_every_n_steps: int = key(at_least(1))
    enable_progress_bar: bool = MISSING
    enable_model_summary: bool = MISSING
    accumulate_grad_batches: int = key(at_least(1))
    gradient_clip_val: float | None = key(at_least(0))
    gradient_clip_algorithm: str | None = key(one_of("norm", "value"))
    deterministic: Any = key(switch("warn"))
    benchmark: bool | None = MISSING
    inference_mode: bool = MISSING
    profiler: str | None = key(one_of("simple", "advanced", "pytorch"))
    detect_anomaly: bool = MISSING


@dataclass
class ParallelConfig:
    """``fsdp``: parameters and optimizer sharded over all ranks."""

    fsdp: bool = MISSING


@dataclass
class TrainConfig:
    """One run; ``kernels`` are those of attention and pair stack, ``compile`` fuses what launches many small ones, and
    ``tf32`` says how exact fp32 matrix products are on GPUs."""

    crop_size: int = key(at_least(1))
    batch_size: int = key(at_least(1))
    dp: Any = MISSING
    seed: int = key(at_least(0))
    ckpt_path: str | None = MISSING
    resume: str | None = MISSING
    config_from: str | None = MISSING
    kernels: str = key(one_of(*KERNELS))
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
