"""Where the project's own files are, in a checkout and in an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

CONF = Path(__file__).parent / "conf"
"""The configuration: a link to the checkout's ``conf``, whose files an installed package has here."""
CHECKOUT = Path(__file__).parents[1]
"""With ``train.py`` and ``data``, where this is no installed package."""


def train_command() -> list[str]:
    """What starts a run, from any working directory."""
    script = CHECKOUT / "train.py"
    return [sys.executable, *([str(script)] if script.exists() else ["-m", "cpfold_train.cli.train"])]
