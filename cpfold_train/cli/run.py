"""One run: from a configuration to a trained checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from cpfold_train.config.check_finetune import require_metric
from cpfold_train.config.check_precision import IN_BF16
from cpfold_train.config.schema import TrainConfig, TrainerConfig
from cpfold_train.config.world import World
from cpfold_train.devices import DEVICES, called_alike, own_gpu_name
from cpfold_train.errors import ConfigError, RunError, in_one_line
from cpfold_train.faults.out_of_memory import MemorySnapshot, is_out_of_memory
from cpfold_train.faults.reporter import FAULTS, FaultReporter, sentence_on
from cpfold_train.faults.restart import AutoRestart
from cpfold_train.faults.skip import SkipBadSteps
from cpfold_train.parallel.anomaly import look_at_local_shards
from cpfold_train.tables import on_terminal
from cpfold_train.training.apply import make_strategy, prepare_module, set_up_process
from cpfold_train.training.datamodule import TileData
from cpfold_train.training.early_stop import EarlyStop
from cpfold_train.training.ema import MovingAverage
from cpfold_train.training.max_time import MaxTime
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.precision import precision_arguments
from cpfold_train.training.reporting.ending import EndBlock
from cpfold_train.training.reporting.loggers import MetricsCSV, wandb_logger
from cpfold_train.training.reporting.module_statistics import ModuleStatistics
from cpfold_train.training.reporting.pictures import Pictures
from cpfold_train.training.reporting.progress import Bar, Lines
from cpfold_train.training.reporting.result import Result
from cpfold_train.training.reporting.start import StartBlock
from cpfold_train.training.reporting.step_metrics import StepMetrics
from cpfold_train.training.reporting.trace_steps import TraceSteps
from cpfold_train.training.save_last import SaveLast
from cpfold_train.training.schedule_start import StartSchedule, schedule_start
from cpfold_train.training.signals import SaveOnSigterm


def run(
    config: TrainConfig, world: World, run_dir: Path, record: dict[str, Any], again: AutoRestart | None = None
) -> None:
    """Train, on this rank and on those that it starts.

    Args:
        config: what the user asked for; ``ckpt_path`` is a path or None.
        world: the ranks.
        run_dir: receives checkpoints, metrics and pictures.
        record: the configuration as plain containers, for W&B.
        again: what can start the run again after an error, where this process is the one to do so.

    Raises:
        RunError: the run could not go on.
    """
    set_up_process(config.memory, config.compile)
    if config.trainer.detect_anomaly:
        look_at_local_shards()
    pl.seed_everything(config.seed, verbose=False)
    module = _module(config)
    require_metric(config.early_stop.monitor, module.trains_confidence)
    strategy = make_strategy(config, world.grid)
    strategy.again, strategy.faults = again, run_dir / FAULTS
    # What FSDP gathers in inference mode could not be used in training.
    inference_mode = config.trainer.inference_mode and not config.parallel.fsdp
    trainer = pl.Trainer(
        **dataclasses.asdict(config.trainer)
        | {"num_nodes": world.num_nodes, "inference_mode": inference_mode, "max_time": None}
        # How far the run is, a callback shows.
        | {"enable_progress_bar": False}
        | precision_arguments(config.trainer),
        strategy=strategy,
        devices=world.devices,
        logger=_loggers(config, run_dir, record),
        callbacks=make_callbacks(config, run_dir, again),
        default_root_dir=run_dir,
        # The loader divides the samples itself, over replicas only.
        use_distributed_sampler=False,
    )
    accumulate = config.trainer.accumulate_grad_batches
    quarantine = run_dir / "quarantine.jsonl"
    data = TileData(config.data, config.crop_size, config.batch_size, accumulate, config.seed, quarantine)
    try:
        # Checkpoints hold optimizer, loops and loader beside tensors: read only those that you trust.
        trainer.fit(module, data, ckpt_path=config.ckpt_path, weights_only=False)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        raise RunError(
            f"interrupted: ckpt_path=last with hydra.run.dir={run_dir} goes on from its last checkpoint"
        ) from None
    except Exception as error:
        sentence = strategy.fault or sentence_on(error, run_dir)
        if sentence is None:
            raise
        raise RunError(sentence) from error
    finally:
        if config.wandb.enabled:
            import wandb

            wandb.finish()


def _module(config: TrainConfig) -> CoFoldingModule:
    try:
        return prepare_module(config)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"a model of these sizes finds no memory ({in_one_line(error)}): type smaller ones, by the keys of model"
        ) from error


def make_callbacks(config: TrainConfig, run_dir: Path, again: AutoRestart | None) -> list[Callback]:
    """The callbacks of a run, in the order in which Lightning calls them; the comments say why where it matters."""
    folder = run_dir / "checkpoints"
    last = SaveLast(folder / "last.ckpt", config.checkpoint.every_n_steps)
    callbacks: list[Callback] = [StartBlock(config, run_dir)]
    # Before the others, so that they see the average in validation. It holds the weights once more.
    if config.optim.ema_decay:
        callbacks.append(MovingAverage(config.optim.ema_decay))
    skip = SkipBadSteps(config.faults.max_skipped, run_dir)
    metrics = StepMetrics(skip, peak_flops(config.trainer))
    if config.faults.memory_snapshot:
        callbacks.append(MemorySnapshot(run_dir / FAULTS))
    callbacks.append(FaultReporter(folder))
    if every_n_steps := config.module_statistics.every_n_steps:
        # Before the gradients of a step that is skipped are taken away.
        callbacks.append(ModuleStatistics(run_dir / "modules.csv", every_n_steps))
    callbacks += [
        skip,
        metrics,
        Pictures(run_dir),
        Result(run_dir, config.seed, skip, metrics),
        SaveOnSigterm(last, again),
        last,
    ]
    if config.data.val and config.trainer.limit_val_batches != 0:
        # A shell and Hydra take the name as it is.
        naming = {"filename": "best-step-{step}", "auto_insert_metric_name": False, "enable_version_counter": False}
        callbacks.append(ModelCheckpoint(folder, monitor="val/loss", mode="min", **naming))
    if config.early_stop.monitor:
        callbacks.append(EarlyStop(**dataclasses.asdict(config.early_stop)))
    if config.trainer.max_time:
        callbacks.append(MaxTime(config.trainer.max_time))
    if config.profile.steps:
        callbacks.append(TraceSteps(run_dir / "profile", *config.profile.steps))
    callbacks.append(StartSchedule(schedule_start(config, run_dir)))
    show_progress = Bar if config.trainer.enable_progress_bar and on_terminal() else Lines
    callbacks.append(show_progress(metrics, run_dir / "metrics.csv"))
    callbacks.append(EndBlock(config, run_dir))
    return callbacks


def peak_flops(trainer: TrainerConfig) -> float | None:
    """Operations a second of this machine's GPU at its best, in the dtype of most products; None of other devices."""
    name = own_gpu_name()
    if trainer.accelerator == "cpu" or name is None or (like := called_alike(name)) is None:
        return None
    return DEVICES[like].bf16 if trainer.precision in IN_BF16 else DEVICES[like].fp32


def _loggers(config: TrainConfig, run_dir: Path, record: dict[str, Any]) -> list[Logger]:
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv")]
    if config.wandb.enabled:
        loggers.append(wandb_logger(config.wandb, run_dir, record, resumes=config.ckpt_path is not None))
    return loggers
