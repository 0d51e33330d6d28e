"""``quarantine.jsonl``: the samples that could not be used, a line each."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpfold_train.data.stream.shards import SampleLocation


def note(path: Path, location: SampleLocation, reason: str, epoch: int, position: int, rank: int) -> None:
    """Add a line, unless the sample has one: ``tar``, ``key``, ``reason``, ``epoch``, ``position``, ``rank``.

    Any number of processes may do so at the same time: a line is one write, and writes to the end of a file do not
    mix. Two that meet the same sample in the same instant may both write it, as locks do not work on every file system
    of a cluster.
    """
    sample = {"tar": location.tar, "key": location.key}
    # Not parsed: the file may be long, and a line of it torn by a file system that does not append in one piece.
    if path.exists() and json.dumps(sample)[:-1] + "," in path.read_text():
        return
    line = sample | {"reason": reason, "epoch": epoch, "position": position, "rank": rank}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_quarantine(path: Path) -> list[dict[str, Any]]:
    """The lines of the file that are whole; none without a file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
