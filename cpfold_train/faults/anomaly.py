"""A NaN that torch has found in a backward pass."""

from __future__ import annotations

import re

_FOUND = re.compile(r"Function '(\w+)' returned nan values")


def anomaly_sentence(error: BaseException) -> str | None:
    """What to say of an error of ``trainer.detect_anomaly``; None of others."""
    if not (found := _FOUND.match(str(error))):
        return None
    return (
        f"trainer.detect_anomaly=true found a NaN that {found[1]} made in the backward pass: the warning above has the "
        "traceback of its forward operation"
    )
