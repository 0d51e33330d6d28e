"""How many ranks there are to be, from the configuration and from what starts the processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid, resolve_grid, squarest

RANK_OF = "CPFOLD_TRAIN_RANK_OF"
"""Variable of the environment with the number of the process that has started this rank."""
RUN_DIR = "CPFOLD_TRAIN_RUN_DIR"
"""The same with the run directory."""
OTHER_LAUNCHERS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
)
"""Variables that make a process believe that it is a rank of a launcher's world."""
IGNORED = "ignored, as no launcher has started this process"
"""What is said of them where there is none."""
MOST_PROCESSES = 1024
"""That a run starts on the CPU of one machine."""
_PARENT = os.getppid()
"""As it was at the start: who loses its parent gets another."""


@dataclass(frozen=True)
class World:
    """The ranks of a run: their grid, and how they lie on machines."""

    grid: Grid
    num_nodes: int
    devices: int

    def note(self) -> str | None:
        """What a user should know of how the grid lies on the machines, if anything."""
        rows, cols = self.grid.rows, self.grid.cols
        if self.grid.rows_within_nodes(self.devices):
            return None
        fits = Grid(*squarest(rows * cols, self.devices))
        return (
            f"rows of cp.grid={rows}x{cols} span machines, which have {self.devices} ranks each; the ranks of a row "
            f"exchange most, and cp.grid={fits} keeps each row on one"
        )


def plan_world(
    grid: str, dp: int | str, num_nodes: int, accelerator: str, env: Mapping[str, str] = os.environ
) -> World:
    """Decide the world before any process is started.

    torchrun and SLURM fix the number of ranks. A plain ``python train.py`` starts as many as the grid asks for: any
    number on CPU, one per GPU on GPUs.

    Args:
        grid: ``"RxC"`` or ``"auto"``.
        dp: number of replicas or ``"auto"``.
        num_nodes: machines, where no launcher says so.
        accelerator: Lightning's name for the kind of device.
        env: the environment.

    Raises:
        ConfigError: where the ranks do not fit.
    """
    gpus = 0 if accelerator == "cpu" else _gpus()
    if accelerator in ("gpu", "cuda") and not gpus:
        raise ConfigError(f"trainer.accelerator={accelerator} finds no GPU here: type trainer.accelerator=cpu")
    started, nodes = _started_ranks(env)
    nodes = nodes or num_nodes
    open_ended = "auto" in (grid, str(dp))
    ranks = started or (gpus * nodes if gpus and open_ended else None)
    per_node = ranks // nodes if ranks and nodes > 1 and ranks % nodes == 0 else None
    replicas, rows, cols = resolve_grid(grid, dp, ranks, per_node)
    world = replicas * rows * cols
    if world % nodes:
        raise ConfigError(
            f"{world} ranks do not divide over {nodes} nodes: type cp.grid and dp such that dp x rows x columns does"
        )
    devices = world // nodes
    if gpus and devices > gpus:
        fits = Grid(*resolve_grid("auto", 1, gpus)[1:])
        raise ConfigError(
            f"cp.grid={rows}x{cols} with dp={replicas} needs {devices} GPUs a node and there are {gpus}: "
            f"type cp.grid={fits} dp=1 or trainer.accelerator=cpu"
        )
    if not started and not gpus and devices > MOST_PROCESSES:
        raise ConfigError(
            f"cp.grid={rows}x{cols} with dp={replicas} would start {devices} processes on this machine: type a cp.grid "
            f"and dp of at most {MOST_PROCESSES}, or trainer.accelerator=gpu where there are GPUs"
        )
    return World(Grid(rows, cols, replicas), nodes, devices)


def check_machines(num_nodes: int, env: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where a run on several machines has no launcher, and does not say where its machines meet."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in env]
    if num_nodes > 1 and _started_ranks(env) == (None, None) and missing:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes} without torchrun or SLURM lacks {', '.join(missing)}: type NODE_RANK=0 "
            "MASTER_ADDR=HOST MASTER_PORT=29500 before the command on the first machine, of this name, NODE_RANK=1 on "
            "the next, or trainer.num_nodes=1"
        )
    if num_nodes > 1 and _started_ranks(env) == (None, None) and is_first_rank(env):
        with socket.socket() as meeting_point:
            meeting_point.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                meeting_point.bind(("", int(env["MASTER_PORT"])))
            except OSError as error:
                raise ConfigError(
                    f"MASTER_PORT={env['MASTER_PORT']} cannot be used here ({error.strerror}): type another one on all "
                    "machines, such as MASTER_PORT=29501"
                ) from error


def _started_ranks(env: Mapping[str, str]) -> tuple[int | None, int | None]:
    """World size and number of nodes that torchrun or SLURM has fixed; None where none has."""
    if started_by_torchrun(env):
        world = int(env["WORLD_SIZE"])
        return world, world // int(env["LOCAL_WORLD_SIZE"])
    if started_by_slurm(env):
        return int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
    return None, None


def starts_ranks(world: World, env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process starts all ranks of the world: none was started by a launcher, or by such a process."""
    return world.num_nodes == 1 and _started_ranks(env) == (None, None) and not started_by_rank_0(env)


def ignore_other_launchers(env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Remove what another launcher has left in the environment of a process that none has started; returns the names.

    A shell profile, a container or a notebook server sets such variables; Lightning would look for ranks that are not
    there.
    """
    if started_by_torchrun(env) or started_by_slurm(env) or started_by_rank_0(env):
        return []
    left = [name for name in OTHER_LAUNCHERS if name in env]
    for name in left:
        del env[name]
    return left


def started_by_rank_0(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank that rank 0 has started, and not one that has inherited its variables."""
    return env.get(RANK_OF) == str(_PARENT)


def run_dir_of_parent(env: Mapping[str, str] = os.environ) -> str | None:
    """The run directory of rank 0, on the ranks that it has started."""
    return env[RUN_DIR] if started_by_rank_0(env) else None


def device_here(accelerator: str) -> str:
    """``gpu`` or ``cpu``, as the planner calls what an accelerator of Lightning's is on this machine."""
    return "gpu" if accelerator != "cpu" and _gpus() else "cpu"


def started_by_torchrun(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started this rank."""
    return all(name in env for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def started_by_slurm(env: Mapping[str, str] = os.environ) -> bool:
    """Whether srun starts the ranks: not in a shell that SLURM has given to a user, in a batch script itself, or in
    what a single task has started, such as the terminal of a notebook server."""
    if not {"SLURM_NTASKS", "SLURM_STEP_ID"} <= set(env) or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return False
    of_task = (str(os.getpid()), str(_PARENT))
    return env["SLURM_NTASKS"] != "1" or env.get("SLURM_TASK_PID", of_task[0]) in of_task


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def is_first_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that speaks to the user, before any process group exists."""
    if started_by_rank_0(env):
        return False
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK") if started_by_slurm(env) else ("RANK", "LOCAL_RANK", "NODE_RANK")
    rank = next((env[name] for name in names if name in env), "0")
    return int(rank) == 0
