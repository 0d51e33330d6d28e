"""The command line: Hydra composes the configuration, then a run or a sweep starts."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from cpfold_train import VERSION
from cpfold_train.cli import sweep
from cpfold_train.cli.run_dir import claimed, remove_metrics
from cpfold_train.config.check import check, count_samples, wandb_switched_off
from cpfold_train.config.check_batches import check_batches
from cpfold_train.config.check_checkpoint import checkpoint_to_resume, is_below
from cpfold_train.config.composition import explain, register, typed_config
from cpfold_train.config.effects import differences_table
from cpfold_train.config.memory_default import room_of, with_default_memory
from cpfold_train.config.recorded import (
    damaged_checkpoints,
    differences,
    recorded_beside,
    recorded_nodes,
    run_of,
    step_of,
    with_record,
    write_record,
)
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.world import (
    IGNORED,
    RUN_DIR,
    World,
    check_machines,
    device_here,
    ignore_other_launchers,
    is_first_rank,
    plan_world,
    started_by_slurm,
    starts_ranks,
)
from cpfold_train.errors import ConfigError, DataError, RunError
from cpfold_train.faults.restart import AutoRestart
from cpfold_train.model.config import MemoryConfig
from cpfold_train.paths import CONF, train_command
from cpfold_train.tables import make_console, print_whole
from cpfold_train.vocabulary import FEATURES_TOLD

CHOSEN_MEMORY = "CPFOLD_TRAIN_MEMORY"
"""Variable of the environment with what ``memory=auto`` has come to, for ranks that this process starts."""


def main() -> None:
    """Run what the command line asks for. Input that cannot work ends with one sentence and exit code 2."""
    # Let Hydra raise its errors instead of printing them, so that they are told like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if "--version" in sys.argv[1:]:
        # Hydra would tell its own.
        print(VERSION)
        return
    if {"--help", "-h"} & set(sys.argv[1:]):
        from cpfold_train.config.help import train_help

        print(train_help())
        return
    _use_directory_of_resumed_run()
    # Several machines without torchrun or SLURM are told of each other by these variables.
    typed = [word.partition("=")[2] for word in sys.argv if word.startswith("trainer.num_nodes=")]
    if (typed or [recorded_nodes(sys.argv[1:])])[-1] == "1" and (left := ignore_other_launchers()):
        print(f"note: {IGNORED}: {', '.join(left)}", file=sys.stderr)
    register()
    try:
        _composed()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except KeyboardInterrupt:
        _refuse("interrupted", code=128 + signal.SIGINT)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _composed(config: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        if config.resume:
            _refuse("resume goes on with one run in its directory: type config_from and ckpt_path for a sweep from it")
        if "TORCHELASTIC_RUN_ID" in os.environ or (started_by_slurm() and int(os.environ["SLURM_NTASKS"]) > 1):
            _refuse("each rank would run the whole sweep: type python train.py -m alone, which starts the ranks")
        job_dir = Path(hydra_config.runtime.output_dir)
        return sweep.run_job(train_command(), list(hydra_config.overrides.task), job_dir, hydra_config.sweep)
    try:
        config = with_record(config, hydra_config.overrides.task)
        start(config, Path(hydra_config.runtime.output_dir), may_vary=_is_named_by_time(hydra_config))
    except (ConfigError, DataError) as error:
        _refuse(str(error))
    except RunError as error:
        _refuse(str(error), code=1)
    return None


def _is_named_by_time(hydra_config: DictConfig) -> bool:
    """Whether the run directory has a name that somebody else's may have; a job of SLURM has one of its own."""
    named = OmegaConf.to_container(hydra_config.run, resolve=False)["dir"]
    return "${run_stamp:" in named and not started_by_slurm()


def start(config: DictConfig, run_dir: Path, may_vary: bool = False) -> None:
    """Check a composed configuration and run it.

    Args:
        config: the configuration.
        run_dir: of the run.
        may_vary: it gets another name where another run has it.

    Raises:
        ConfigError, DataError: before any other process is started, where it cannot work.
        RunError: the run has ended early, and does not start again by itself.
    """
    typed = typed_config(config)
    typed.ckpt_path = checkpoint_to_resume(config.ckpt_path, run_dir)
    check(typed)
    samples = count_samples(typed)
    world = plan_world(typed.cp.grid, typed.dp, typed.trainer.num_nodes, typed.trainer.accelerator)
    check_machines(typed.trainer.num_nodes)
    check_batches(typed, *samples, world.grid.dp)
    device = device_here(typed.trainer.accelerator)
    if device == "gpu":
        from cpfold_train.training.gpus import set_up_gpus

        # Before anything asks the device: its allocator reads the environment once.
        set_up_gpus(typed.tf32)
    room = room_of(typed, world.grid, device)
    if typed.memory.auto:
        typed.memory = _chosen_memory(typed, world, device)
    typed.memory = with_default_memory(typed, world.grid, room).memory
    config.memory = OmegaConf.structured(typed.memory)
    off = wandb_switched_off() if typed.wandb.enabled else None
    typed.wandb.enabled &= off is None
    offline = typed.wandb.enabled and os.environ.get("WANDB_MODE") == "offline"
    for note in (
        world.note(),
        off and f"wandb.enabled=true is switched off by {off}",
        offline and "W&B is offline, as WANDB_MODE=offline says; wandb sync uploads what the run directory has",
    ):
        if note and is_first_rank():
            print(f"note: {note}", file=sys.stderr)
    goes_on = config.ckpt_path == "last" or is_below(typed.ckpt_path, run_dir)
    if '"' in str(run_dir):
        # The ranks get it on their command line, between such.
        raise ConfigError(f"hydra.run.dir={run_dir} has a double quote: type another hydra.run.dir")
    with claimed(run_dir, may_vary, goes_on) as run_dir:
        # Of the directory that it has got.
        typed.ckpt_path = checkpoint_to_resume(config.ckpt_path, run_dir)
        _run(typed, config, world, run_dir)


def _run(typed: TrainConfig, config: DictConfig, world: World, run_dir: Path) -> None:
    record = OmegaConf.to_container(config, resolve=True)
    if is_first_rank():
        if typed.ckpt_path is None:
            remove_metrics(run_dir)
            try:
                write_record(record, run_dir)
            except OSError as error:
                raise ConfigError(
                    f"hydra.run.dir={run_dir} cannot be written ({error.strerror}): type another hydra.run.dir"
                ) from error
        else:
            _tell_resume(config, typed.ckpt_path)
        print(f"features: {FEATURES_TOLD[typed.data.features]}", file=sys.stderr)
    again = AutoRestart(run_dir) if starts_ranks(world) else None
    os.environ[RUN_DIR] = str(run_dir)
    # Lightning takes seconds to import; a wrong key is to be told at once.
    from cpfold_train.cli.run import run

    try:
        run(typed, world, run_dir, record, again)
    except RunError:
        if again is not None:
            again.after_out_of_memory()
        raise


def _use_directory_of_resumed_run() -> None:
    """Let Hydra take the directory of ``resume=RUN`` for that of the run, where no other is typed."""
    given = [word for word in sys.argv[1:] if word.startswith("resume=")]
    if not given:
        return
    name = given[-1].partition("=")[2]
    if not name.strip("'\""):
        _refuse("resume= names no run: type its directory, such as resume=runs/DATE/TIME")
    if not any(word.startswith("hydra.run.dir=") for word in sys.argv):
        # Options may follow, after which Hydra takes no more keys.
        sys.argv.insert(sys.argv.index(given[-1]), f"hydra.run.dir={name}")


def _tell_resume(config: DictConfig, ckpt_path: str) -> None:
    """Where the run goes on from, what is passed over, and which keys have other values than there."""
    checkpoint = Path(ckpt_path)
    step = step_of(checkpoint)
    for path in damaged_checkpoints(run_of(checkpoint), -1 if step is None else step):
        print(f"note: {path} is damaged or not complete, and is passed over", file=sys.stderr)
    print(f"resuming from {checkpoint}{'' if step is None else f', step {step}'}", file=sys.stderr)
    if changed := differences(recorded_beside(ckpt_path) or {}, config):
        print("these keys have other values than its run had:", file=sys.stderr)
        print_whole(make_console(stderr=True), differences_table(changed))


def _chosen_memory(config: TrainConfig, world: World, device: str) -> MemoryConfig:
    """The memory options that the planner chooses.

    Ranks that this process starts take its choice from the environment; those of a launcher all come to the same.
    """
    if chosen := os.environ.get(CHOSEN_MEMORY):
        return MemoryConfig(**json.loads(chosen))
    from cpfold_train.plan.propose import choose_memory
    from cpfold_train.plan.report import typed_options

    with Console(stderr=True).status("memory=auto: planning") if is_first_rank() else nullcontext():
        largest = replace(config, crop_size=config.largest_crop)
        memory = choose_memory(largest, world.grid, device)
    if is_first_rank():
        print(f"memory=auto: {' '.join(typed_options(memory))}", file=sys.stderr)
    os.environ[CHOSEN_MEMORY] = json.dumps(asdict(memory))
    return memory


def _refuse(sentence: str, code: int = 2) -> NoReturn:
    if is_first_rank():
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
