"""What the value of a configuration key may be: said beside its type, read by the check and by the documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, NamedTuple

from omegaconf import MISSING


class Bounds(NamedTuple):
    """What a value may be. None, where the type allows it, is always in bounds.

    Attributes:
        text: says it.
        holds: whether a value is in bounds; False of what is not a number.
        wrong: says of a value that it is not.
        type: what to type instead; ``KEY`` stands for the key.
    """

    text: str
    holds: Callable[[Any], bool]
    wrong: str
    type: str

    def refusal(self, key: str, value: Any) -> str:
        """One sentence on a value out of bounds, which ends with what to type."""
        return f"{key}={value} is {self.wrong}: type {self.type.replace('KEY', key)}"


def key(bounds: Bounds | None = None, default: Any = MISSING) -> Any:
    """A field of a configuration, which without a default gets its value from ``conf``."""
    return field(default=default, metadata={"bounds": bounds})


def at_least(least: float, or_zero: bool = False) -> Bounds:
    """``least`` or more; or 0, where that stands for none."""
    text = f"0, or {least} or more" if or_zero else f"{least} or more"
    return Bounds(text, lambda x: x >= least or (or_zero and x == 0), "too small", f"KEY={text}")


def above(least: float, example: str) -> Bounds:
    """A finite number above ``least``, such as ``example``."""
    text = f"above {least}"
    return Bounds(text, lambda x: least < x < math.inf, f"not a number {text}", f"for example KEY={example}")


def up_to(most: float, example: str) -> Bounds:
    """Above 0 and at most ``most``."""
    text = f"above 0, up to {most}"
    return Bounds(text, lambda x: 0 < x <= most, f"not a number {text}", f"for example KEY={example}")


def from_to(low: float, high: float) -> Bounds:
    """Both ends included."""
    text = f"from {low} to {high}"
    return Bounds(text, lambda x: low <= x <= high, f"not a number {text}", f"a number {text}")


def below(high: float, example: str) -> Bounds:
    """From 0 on, ``high`` not included."""
    text = f"from 0 on, below {high}"
    return Bounds(text, lambda x: 0 <= x < high, f"not a number {text}", f"for example KEY={example}")


def pair(bounds: Bounds, example: str) -> Bounds:
    """Two values, each within its bounds."""

    def holds(x: Sequence[Any]) -> bool:
        return len(x) == 2 and all(map(bounds.holds, x))

    return Bounds(f"two, {bounds.text}", holds, f"not two numbers {bounds.text}", f"for example KEY={example}")


def one_of(*values: str | int) -> Bounds:
    """One of these."""
    text = ", ".join(map(str, values))
    return Bounds(text, lambda x: x in values, "not supported", " or ".join(f"KEY={value}" for value in values))


def batches(least: int, example: str) -> Bounds:
    """A number of batches, or a fraction of them all; what is written with a point is a fraction."""
    text = f"a whole number of batches from {least} on, or a fraction of all, above 0.0 and up to 1.0"

    def holds(x: Any) -> bool:
        return (type(x) is int and x >= least) or (type(x) is float and 0 < x <= 1)

    return Bounds(text, holds, f"not {text}", f"for example KEY={example}")


def switch(*values: str) -> Bounds:
    """``true``, ``false``, or one of these."""
    text = ", ".join(("true", "false", *values))
    return Bounds(text, lambda x: x is True or x is False or x in values, f"not {text}", "KEY=true or KEY=false")


def switch_or_count() -> Bounds:
    """``true``, ``false``, or a number from 0 on."""
    text = "true, false, or a whole number from 0 on"
    return Bounds(text, lambda x: isinstance(x, int) and x >= 0, f"not {text}", "KEY=true or for example KEY=2")


def duration() -> Bounds:
    """``DD:HH:MM:SS``."""
    form = re.compile(r"\d+:\d\d:\d\d:\d\d")
    return Bounds(
        "DD:HH:MM:SS",
        lambda x: isinstance(x, str) and form.fullmatch(x) is not None,
        "not a time as DD:HH:MM:SS",
        "for example KEY=00:23:30:00",
    )
