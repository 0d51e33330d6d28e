"""What Lightning says about itself."""

from __future__ import annotations

import logging
import warnings


def quiet_lightning() -> None:
    """Keep what Lightning says about itself off the terminal: what matters of a run, its callbacks show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    unneeded = ("LeafSpec", "Total length of `list`", "does not have many workers", "predict returned None")
    unneeded += ("exists and is not empty", "smaller than the logging interval")
    for message in unneeded:
        warnings.filterwarnings("ignore", f".*{message}.*")
