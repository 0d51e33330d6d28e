"""The command line: Hydra composes the configuration, then a run or a sweep starts."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import hydra
import psutil
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from cpfold_train.errors import ConfigError, DataError, RunError
from cpfold_train.kernels.choice import choose_kernels
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.training import sweep
from cpfold_train.training.check import check
from cpfold_train.training.check_checkpoint import checkpoint_to_resume
from cpfold_train.training.config import TrainConfig
from cpfold_train.training.launch import World, device_here, is_first_rank, plan_world, started_by_slurm, starts_ranks
from cpfold_train.training.memory_default import Room, with_default_memory
from cpfold_train.training.restart import StartAgain

ROOT = Path(__file__).resolve().parents[2]
CHOSEN_MEMORY = "CPFOLD_TRAIN_MEMORY"
"""Variable of the environment with what ``memory=auto`` has come to, for ranks that this process starts."""


def main() -> None:
    """Run what the command line asks for. Input that cannot work ends with one sentence and exit code 2."""
    # Let Hydra raise its errors instead of printing them, so that they are told like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register()
    try:
        _composed()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except KeyboardInterrupt:
        _refuse("interrupted", code=128 + signal.SIGINT)


def register() -> None:
    """Tell Hydra the schema and the resolvers that ``conf`` uses."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
def _composed(config: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        if "TORCHELASTIC_RUN_ID" in os.environ or (started_by_slurm() and int(os.environ["SLURM_NTASKS"]) > 1):
            _refuse("each rank would run the whole sweep: type python train.py -m alone, which starts the ranks")
        job_dir = Path(hydra_config.runtime.output_dir)
        return sweep.run_job(ROOT / "train.py", list(hydra_config.overrides.task), job_dir)
    try:
        start(config, Path(hydra_config.runtime.output_dir))
    except (ConfigError, DataError) as error:
        _refuse(str(error))
    except RunError as error:
        _refuse(str(error), code=1)
    return None


def start(config: DictConfig, run_dir: Path) -> None:
    """Check a composed configuration and run it.

    Raises:
        ConfigError, DataError: before any other process is started, where it cannot work.
        RunError: the run has ended early, and does not start again by itself.
    """
    typed = typed_config(config)
    typed.ckpt_path = checkpoint_to_resume(typed.ckpt_path, run_dir)
    check(typed)
    world = plan_world(typed.cp.grid, typed.dp, typed.trainer.num_nodes, typed.trainer.accelerator)
    room = _room(typed, world.grid)
    if typed.memory.auto:
        typed.memory = _chosen_memory(typed, world)
    typed.memory = with_default_memory(typed, world.grid, room).memory
    config.memory = OmegaConf.structured(typed.memory)
    if is_first_rank():
        if note := world.note():
            print(f"note: {note}", file=sys.stderr)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(config, run_dir / "resolved.yaml", resolve=True)
        except OSError as error:
            raise ConfigError(
                f"hydra.run.dir={run_dir} cannot be written ({error.strerror}): type another hydra.run.dir"
            ) from error
    again = StartAgain(run_dir) if starts_ranks(world) else None
    # Lightning takes seconds to import; a wrong key is to be told at once.
    from cpfold_train.training.run import run

    try:
        run(typed, world, run_dir, OmegaConf.to_container(config, resolve=True), again)
    except RunError:
        if again is not None:
            again.after_out_of_memory()
        raise


def _room(config: TrainConfig, grid: Grid) -> Room | None:
    """Memory for a rank on this machine's GPU, which is told first what it is to be told; None where the run is on
    CPU."""
    if device_here(config.trainer.accelerator) == "cpu":
        return None
    import torch

    from cpfold_train.memory import host_bytes_in_all
    from cpfold_train.training.gpus import set_up_gpus

    # Before anything asks the device: its allocator reads the environment once.
    set_up_gpus(config.tf32)
    capability, precision = torch.cuda.get_device_capability(0), config.trainer.precision
    kernels = choose_kernels(config.kernels, "cuda", precision, capability).name
    host_bytes = host_bytes_in_all() * config.trainer.num_nodes / grid.world_size
    return Room(torch.cuda.get_device_properties(0).total_memory, host_bytes, kernels)


def _chosen_memory(config: TrainConfig, world: World) -> MemoryConfig:
    """The levers that the planner chooses. Ranks that this process starts take its choice from the environment; those
    of a launcher all come to the same."""
    if chosen := os.environ.get(CHOSEN_MEMORY):
        return MemoryConfig(**json.loads(chosen))
    from cpfold_train.plan.propose import choose_memory
    from cpfold_train.plan.report import typed_levers

    with Console(stderr=True).status("memory=auto: planning") if is_first_rank() else nullcontext():
        largest = replace(config, crop_size=config.largest_crop)
        memory = choose_memory(largest, world.grid, device_here(config.trainer.accelerator))
    if is_first_rank():
        print(f"memory=auto: {' '.join(typed_levers(memory))}", file=sys.stderr)
    os.environ[CHOSEN_MEMORY] = json.dumps(asdict(memory))
    return memory


def typed_config(config: DictConfig) -> TrainConfig:
    """A composed configuration with the schema's types.

    Raises:
        ConfigError: it has keys that the schema does not have.
    """
    if added := next(_added(config, OmegaConf.structured(TrainConfig)), None):
        raise ConfigError(f"there is no key {added}: conf/train.yaml lists them all")
    return OmegaConf.to_object(config)


def run_stamp() -> str:
    """Name of the run directory, the same on every rank: DATE/TIME, or the number of the job's step under srun.

    The ranks that torchrun starts compose their configurations seconds apart; what they share is their parent. A job
    that SLURM puts back into the queue keeps its number, and so its run directory.
    """
    if started_by_slurm() and "SLURM_STEP_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    started = psutil.Process(os.getppid()).create_time() if "TORCHELASTIC_RUN_ID" in os.environ else time.time()
    return time.strftime("%Y-%m-%d/%H-%M-%S", time.localtime(started))


def explain(error: Exception) -> str:
    """One sentence on an error of Hydra or OmegaConf."""
    text = str(error)
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        schema = OmegaConf.structured(TrainConfig)
        if key in list(_keys(schema)):
            # Hydra adds to a mapping that a recipe has made, and only what it knows.
            return f"{key} has other keys already: type {key}=null before it to replace them"
        near = difflib.get_close_matches(key, list(_keys(schema)), n=1, cutoff=0.5)
        return f"there is no key {key}: " + (f"did you mean {near[0]}?" if near else "conf/train.yaml lists them all")
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines()]
    told = [line for line in lines if line and not line.startswith(("object_type", "reference_type", "provider="))]
    return " ".join(told).replace("full_key: ", "in ").replace(" Config search path:", "")


def _added(node: DictConfig, schema: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys of ``node`` that the schema does not have; what lies in one of any type, such as ``data.crop``, is free."""
    for key in node:
        if key not in list(schema):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_missing(schema, key) and OmegaConf.is_dict(schema[key]):
            yield from _added(node[key], schema[key], f"{prefix}{key}.")


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield prefix + key
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from _keys(node[key], f"{prefix}{key}.")


def _refuse(sentence: str, code: int = 2) -> NoReturn:
    if is_first_rank():
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
