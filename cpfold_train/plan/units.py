"""Seconds and bytes as a person reads them."""

from __future__ import annotations

KIB = 2**10
_TIMES = (("ms", 1e-3, 1.0), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, float("inf")))
"""Units of time, their seconds, and those from which on the next is used."""


def time_text(seconds: float) -> str:
    """Three digits of milliseconds, seconds, minutes or hours; and 0."""
    if not seconds:
        return "0"
    unit, size = next((unit, size) for unit, size, most in _TIMES if seconds < most)
    return f"{_three_digits(seconds / size)} {unit}"


def size_text(n_bytes: float) -> str:
    """Three digits of KiB, MiB, GiB or TiB; and 0."""
    if not n_bytes:
        return "0"
    size, unit = n_bytes / KIB, 0
    while size >= 1000 and unit < 3:
        size, unit = size / KIB, unit + 1
    return f"{_three_digits(size)} {('KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def _three_digits(x: float) -> str:
    return f"{x:,.{2 if x < 9.995 else 1 if x < 99.95 else 0}f}"
