"""What can be found wrong with the checkpoints that a run is to start from."""

from __future__ import annotations

import zipfile
from pathlib import Path

from cpfold_train.checkpoints.boltz import CONSOLIDATE
from cpfold_train.checkpoints.sharded import is_sharded_checkpoint
from cpfold_train.errors import ConfigError
from cpfold_train.paths import looked_for


def checkpoint_to_resume(ckpt_path: str | None, run_dir: Path) -> str | None:
    """What ``ckpt_path`` means: ``last`` is what an earlier start of the same command has left in the run directory, if
    it has left a complete one."""
    if ckpt_path != "last":
        return ckpt_path
    last = run_dir / "checkpoints" / "last.ckpt"
    # A run that began to shard its parameters, or no longer does, may have been killed while it exchanged them.
    both = last, last.with_name(f"{last.name}.new")
    return next((str(path) for path in both if path.is_file() or is_sharded_checkpoint(path)), None)


def is_below(ckpt_path: str | None, run_dir: Path) -> bool:
    """Whether a checkpoint is one of the run directory."""
    return ckpt_path is not None and Path(ckpt_path).resolve().is_relative_to(run_dir.resolve())


def check_checkpoints(ckpt_path: str | None, init_from: str | None, fsdp: bool) -> None:
    """Raise ConfigError where one does not exist, or is none that the run can read.

    Args:
        ckpt_path: to resume from: a file, or with FSDP the directory that a run with it has written.
        init_from: of weights, a file, which is not read where a run resumes.
        fsdp: whether the run shards its parameters.
    """
    if ckpt_path is not None and not (fsdp and is_sharded_checkpoint(Path(ckpt_path))):
        _require_file(
            f"ckpt_path={ckpt_path}",
            Path(ckpt_path),
            "leave it out",
            " and resume from OUT.ckpt, or parallel.fsdp=true",
        )
    if init_from is not None and ckpt_path is None:
        _require_file(
            f"model.init_from={init_from}", Path(init_from), "model.init_from=null", " and model.init_from=OUT.ckpt"
        )


def _require_file(given: str, path: Path, without: str, after: str) -> None:
    if path.is_file():
        if not zipfile.is_zipfile(path) and path.stat().st_size:
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    raise ConfigError(f"{given} is not complete: type the path of another .ckpt file, or {without}")
        return
    if is_sharded_checkpoint(path):
        raise ConfigError(f"{given} was written with parallel.fsdp=true: type {CONSOLIDATE.format(path)}{after}")
    if path.is_dir():
        raise ConfigError(
            f"{given} is a directory that holds no complete checkpoint: type the path of another, or {without}"
        )
    raise ConfigError(f"{given} does not exist{looked_for(path)}: type the path of a .ckpt file, or {without}")
