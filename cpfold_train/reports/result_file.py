"""``result.json``: how a run ended, for people, scripts and sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpfold_train.whole_file import whole_file

RESULT = "result.json"


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write a run's result; parent directories are made."""
    with whole_file(run_dir / RESULT) as file:
        file.write(json.dumps(result, indent=1) + "\n")


def read_result(run_dir: Path) -> dict[str, Any]:
    """A run's result; empty where it ended before it could write one."""
    path = run_dir / RESULT
    return json.loads(path.read_text()) if path.exists() else {}
