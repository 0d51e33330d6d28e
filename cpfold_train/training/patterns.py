"""Names of weights and modules by pattern, as a user writes them: Boltz-2's names with wildcards."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from cpfold_train.errors import ConfigError

_SHOWN = 24


def matching(key: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern gives, and all that lie within a module that it gives.

    Args:
        key: of the configuration that has the pattern, for the error.
        pattern: a dotted name. ``*``, ``?`` and ``[abc]`` are those of file names, but that ``*`` also goes past dots;
            a part such as ``0-47`` is any whole number from 0 to 47.
        names: of weights or modules.

    Raises:
        ConfigError: there is none; it names what is near.
    """
    expression = re.compile(_expression(pattern.split(".")) + r"(\..*)?")
    if found := [name for name in names if expression.fullmatch(name)]:
        return found
    raise ConfigError(f"{key} has {pattern}, but " + _near(pattern.split("."), names))


def _expression(parts: Iterable[str]) -> str:
    """Regular expression of the parts of a pattern."""
    return r"\.".join(map(_part, parts))


def _part(part: str) -> str:
    if interval := re.fullmatch(r"(\d+)-(\d+)", part):
        first, last = map(int, interval.groups())
        return "(?:" + "|".join(map(str, range(first, last + 1))) + ")"
    return fnmatch.translate(part).removesuffix(r"\Z").removesuffix(r"\z")


def _near(parts: list[str], names: Sequence[str]) -> str:
    """Where a pattern leaves the tree of names, and what is there instead."""
    heads = {tuple(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 2)}
    for known in reversed(range(len(parts))):
        expression = re.compile(_expression(parts[:known]))
        reached = {head for head in heads if expression.fullmatch(".".join(head))}
        if reached:
            break
    following = {head[-1] for head in heads if head and head[:-1] in reached}
    where = f"{'.'.join(parts[:known])} has" if known else "the model has"
    near = difflib.get_close_matches(parts[known], sorted(following), n=1)
    if near and not near[0].isdigit():
        return f"{where} no {parts[known]}: did you mean {'.'.join([*parts[:known], near[0]])}?"
    shown = sorted(following, key=lambda part: (len(part), part) if part.isdigit() else (0, part))
    more = ", ..." if len(shown) > _SHOWN else ""
    return f"{where} no {parts[known]}: it has {', '.join(shown[:_SHOWN]) or 'no parts'}{more}"
