"""Where the project's own files are, in a checkout and in an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

CONF = Path(__file__).parent / "conf"
"""The configuration: a link to the checkout's ``conf``, whose files an installed package has here."""
DATA = (Path(__file__).parent / "example_data").resolve()
"""The shards that come with the project: a link in the same way, to the checkout's ``data``."""
CHECKOUT = Path(__file__).parents[1]
"""With ``train.py`` and ``data``, where this is no installed package."""


def looked_for(path: str | Path) -> str:
    """Where a path that is not found was looked for, to be said after it; nothing of an absolute one."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}, where the command was typed"


def train_command() -> list[str]:
    """What starts a run, from any working directory."""
    # In a checkout the package's configuration is a link to the folder beside it. A train.py that lies beside an
    # installed package is somebody else's.
    is_checkout = CONF.resolve() == (CHECKOUT / "conf").resolve()
    return [sys.executable, *([str(CHECKOUT / "train.py")] if is_checkout else ["-m", "cpfold_train.cli.start"])]
