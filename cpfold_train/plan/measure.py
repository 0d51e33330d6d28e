"""Short real runs on the CPUs of this machine, to be held against plans."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from cpfold_train.errors import ConfigError
from cpfold_train.paths import train_command
from cpfold_train.reports.metrics_csv import read_metrics

GIVEN_BACK_BYTES = 1 << 18
"""Where memory is measured, the system gets all tensors back from this size on when they are freed. It takes longer,
but a heap of freed tensors, which a plan cannot know, does not come on top of those that live."""


def run_once(settings: list[str], give_back: bool) -> dict:
    """Run ``train.py`` with these settings, a thread a rank.

    Args:
        give_back: give the system all memory back that is freed, to see what is held at a time.

    Returns:
        ``result.json``, and ``step_s``, the seconds of the last step.

    Raises:
        ConfigError: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*train_command(), *settings, f"hydra.run.dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if give_back:
            environment["MALLOC_MMAP_THRESHOLD_"] = str(GIVEN_BACK_BYTES)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            *_, reason = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
            raise ConfigError(f"the run of {' '.join(settings)} failed: {reason}")
        result = json.loads((Path(folder) / "result.json").read_text())
        *_, last = read_metrics(Path(folder) / "metrics.csv")
    return result | {"step_s": float(last["step_s"])}
