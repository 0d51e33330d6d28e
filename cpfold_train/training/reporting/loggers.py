"""What receives the metrics of a run: ``metrics.csv``, and Weights & Biases for those who ask for it."""

from __future__ import annotations

import netrc
import os
import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from cpfold_train.config.schema import WandbConfig
from cpfold_train.reports.metrics_csv import MetricsFile


class MetricsCSV(Logger):
    """Writes ``metrics.csv``, on the first rank alone.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = MetricsFile(path)

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._file.add(metrics, step)


def wandb_logger(config: WandbConfig, run_dir: Path, record: dict[str, Any], resumes: bool) -> WandbLogger:
    """A logger that writes into the run directory; offline where there is no key and ``WANDB_MODE`` is not set.

    A run that resumes in its directory goes on as the same run of W&B, but offline, where W&B cannot.

    Args:
        config: project, name and entity.
        run_dir: receives ``wandb/``; an offline run is uploaded with ``wandb sync``.
        record: the configuration of the run.
        resumes: whether it goes on from a checkpoint.
    """
    offline = os.environ.get("WANDB_MODE", "online" if _has_key() else "offline") != "online"
    return WandbLogger(
        name=config.name or run_dir.name,
        project=config.project,
        entity=config.entity,
        save_dir=run_dir,
        offline=offline,
        config=record,
        id=None if offline else _run_id(run_dir / "wandb_id", resumes),
        resume=None if offline else "allow",
    )


@rank_zero_only
def _run_id(file: Path, resumes: bool) -> str:
    """What W&B knows the run by. Only the first rank logs."""
    if not (resumes and file.exists()):
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
