"""``docs/configuration.md``: every key, with values and texts as ``conf`` has them and the bounds of the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cpfold_train.config.check_bounds import keys_of
from cpfold_train.config.schema import TrainConfig
from cpfold_train.paths import CONF

PRESETS = {
    "memory": ("default",),
    "model": ("boltz2", "small", "quickstart"),
    "trainer": ("default",),
    "data": ("default",),
    "optim": ("quickstart", "af3"),
}
"""Files of each group of ``conf``; the texts are those of the first."""
_OF_HYDRA = "defaults", "hydra"


class DocumentedKey(NamedTuple):
    """A key as a file of ``conf`` has it.

    Attributes:
        path: of the key in the file.
        value: a dict where there are keys below it.
        text: the comment above it; None where that of the key before it holds for both.
    """

    path: tuple[str, ...]
    value: Any
    text: str | None


def page() -> str:
    """The whole page."""
    parts = [
        "# Configuration",
        "Made from the comments of `conf/` and the bounds of the schema by `python docs/write_pages.py`. Any key can "
        "be set on the command line, as `python train.py crop_size=512 trainer.max_steps=100`. A key without a text of "
        "its own belongs to the text above it.",
        "## The run",
    ]
    own = [entry for entry in entries(CONF / "train.yaml") if entry.path[0] not in _OF_HYDRA]
    top = [entry for entry in own if len(entry.path) == 1 and not isinstance(entry.value, dict)]
    parts.append(_table(top, {"default": CONF / "train.yaml"}, ()))
    for section in (entry for entry in own if len(entry.path) == 1 and isinstance(entry.value, dict)):
        below = [entry for entry in own if entry.path[:1] == section.path and entry is not section]
        parts += [f"## {section.path[0]}", *filter(None, [section.text])]
        parts.append(_table(below, {"default": CONF / "train.yaml"}, ()))
    for group, names in PRESETS.items():
        files = {f"`{group}={name}`" if len(names) > 1 else "default": CONF / group / f"{name}.yaml" for name in names}
        found = entries(CONF / group / f"{names[0]}.yaml")
        parts += [f"## {group}", _header(CONF / group / f"{names[0]}.yaml"), _table(found, files, (group,))]
    return "\n\n".join(parts) + "\n"


def entries(path: Path) -> list[DocumentedKey]:
    """Every key of a file of ``conf``, in its order."""
    return list(_entries(path.read_text().splitlines(), yaml.safe_load(path.read_text())))


def _entries(lines: list[str], values: dict[str, Any]) -> Iterator[DocumentedKey]:
    parents: list[str] = []
    comment: list[str] = []
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("#"):
            # A star is a wildcard, not the begin of italics.
            comment.append(stripped.removeprefix("#").strip().replace("*", "\\*"))
        elif found := re.match(r"( *)(\w+):", line):
            parents = [*parents[: len(found[1]) // 2], found[2]]
            value = values
            for name in parents:
                value = value[name]
            yield DocumentedKey(tuple(parents), value, " ".join(comment) or None)
            comment = []
        else:
            # What stands above an empty line is of the file.
            comment = []


def _header(path: Path) -> str:
    """What a file says of itself: the comment that it begins with."""
    lines = path.read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


def _table(found: list[DocumentedKey], files: dict[str, Path], prefix: tuple[str, ...]) -> str:
    bounds = {key: bounds for key, _, bounds in keys_of(TrainConfig())}
    presets = [{entry.path: entry.value for entry in entries(path)} for path in files.values()]
    rows = [("key", *files, "bounds", "meaning"), ("---",) * (len(files) + 3)]
    for entry in found:
        key = ".".join((*prefix, *entry.path))
        if isinstance(entry.value, dict):
            if entry.text:
                rows.append((f"**`{key}`**", *[""] * len(files), "", entry.text))
            continue
        allowed = bounds[key]
        values = [as_typed(preset[entry.path]).replace("*", "\\*") for preset in presets]
        rows.append((f"`{key}`", *values, "" if allowed is None else allowed.text, entry.text or ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
