"""``train --help``: the keys that matter most, by group, with their defaults; all of them are in the documentation."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator

from cpfold_train.config.reference import as_typed, entries
from cpfold_train.paths import CONF

_WIDTH, _COLUMN = 80, 36
_GROUPS = {
    "Crop, grid and run": ("crop_size", "cp.grid", "dp", "batch_size", "seed", "resume", "ckpt_path", "hydra.run.dir"),
    "Data": ("data.train", "data.val", "data.crop", "data.sampling", "data.num_workers"),
    "What is trained, and how": (
        *("optim.lr", "optim.warmup_steps", "optim.ema_decay", "trainer.max_steps", "trainer.max_time"),
        *("trainer.accumulate_grad_batches", "trainer.val_check_interval", "finetune.freeze", "finetune.lora.patterns"),
        *("early_stop.monitor", "model.init_from"),
    ),
    "Machine, speed and memory": (
        *("trainer.accelerator", "trainer.precision", "kernels", "compile", "tf32", "parallel.fsdp"),
        *("memory.recompute", "memory.offload"),
    ),
    "What is written": ("checkpoint.every_n_steps", "wandb.enabled", "profile.steps"),
}
"""Titles, and the keys below each."""
_FILES = {
    ("train.yaml", ""): "train.yaml",
    ("model/quickstart.yaml", "model."): "model/boltz2.yaml",
    ("memory/default.yaml", "memory."): "memory/default.yaml",
    ("trainer/default.yaml", "trainer."): "trainer/default.yaml",
    ("data/default.yaml", "data."): "data/default.yaml",
    ("optim/quickstart.yaml", "optim."): "optim/af3.yaml",
}
"""File of ``conf`` with the defaults, what stands before its keys, and the file with the texts."""
_COMMAND = "python train.py"
_EXAMPLES = f"""\
# The quickstart: a small model on four CPU processes.
{_COMMAND}
# Fine-tune Boltz-2 on own shards.
{_COMMAND} model=boltz2 model.init_from=boltz2_conf.ckpt \\
    'data.train=[my/train-*.tar]' 'data.val=[my/val-*.tar]' crop_size=768 \\
    cp.grid=2x2 trainer.accelerator=gpu trainer.precision=bf16-mixed
# Go on with a run, with its own configuration but for what is typed.
{_COMMAND} resume=runs/mine trainer.max_steps=3000
# Begin a run, and go on with it by the same command.
{_COMMAND} hydra.run.dir=runs/mine ckpt_path=last
# A sweep: one job for each value.
{_COMMAND} -m optim.lr=1e-4,3e-4"""


def train_help() -> str:
    """The whole help, at most 80 columns wide."""
    keys = _keys()
    parts = [
        f"usage: {_COMMAND} [KEY=VALUE ...] [OPTION ...]\n       cpfold-train train ... is the same",
        textwrap.fill(
            "Train or fine-tune a co-folding model, each sample sharded over a grid of ranks. Every key of the "
            "configuration can be set; these are the ones most often used, with their defaults.",
            _WIDTH,
        ),
    ]
    parts += [_section(f"{title}:", (_row(*keys[key]) for key in shown)) for title, shown in _GROUPS.items()]
    parts.append(_section("Files that set many keys:", _files()))
    parts.append(_section("Recipes, which are complete runs (recipe=NAME):", _recipes()))
    parts.append("Examples:\n" + textwrap.indent(_EXAMPLES, "  "))
    more = {
        "--cfg job": "show the whole configuration and start nothing",
        "-m, --multirun": "a sweep over values with commas between them",
        "--hydra-help": "options of Hydra",
        "--version": "the product's",
    }
    parts.append(_section("Options:", (_row(name, text) for name, text in more.items())))
    parts.append("docs/configuration.md has every key with its bounds, docs/settings.md what to\ntype for what.")
    return "\n\n".join(parts)


def _section(title: str, rows: Iterable[str]) -> str:
    return "\n".join((title, *rows))


def _row(name: str, text: str) -> str:
    """A name, and what it is beside it or, of a long one, below."""
    lines = textwrap.wrap(text, _WIDTH - _COLUMN)
    if len(name) > _COLUMN - 4:
        return "\n".join((f"  {name}", *(" " * _COLUMN + line for line in lines)))
    return f"  {name:{_COLUMN - 2}}" + ("\n" + " " * _COLUMN).join(lines)


def _keys() -> dict[str, tuple[str, str]]:
    """How each key is typed, and what it is, by name. A key without a text belongs to the text above it."""
    found, text = {}, ""
    for (file, prefix), documented in _FILES.items():
        values = {entry.path: entry.value for entry in entries(CONF / file)}
        for entry in entries(CONF / documented):
            if entry.text and not entry.text.startswith("Default"):
                text = _first_clause(entry.text.replace("\\*", "*"))
            key, value = prefix + ".".join(entry.path), values.get(entry.path, entry.value)
            # What is worked out at the start is told in the text.
            found[key] = (key if "${" in str(value) else f"{key}={as_typed(value)}"), text
    return found


def _files() -> Iterator[str]:
    for group in ("model", "optim", "memory"):
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        yield _row(f"{group}=NAME", ", ".join(names))


def _recipes() -> Iterator[str]:
    for path in sorted((CONF / "recipe").glob("*.yaml")):
        # The first line is Hydra's, and what is typed stands further in.
        told = [line.removeprefix("# ") for line in path.read_text().splitlines()[1:] if line.startswith("# ")]
        own = itertools.takewhile(lambda line: not line.startswith(" "), told)
        yield _row(path.stem, _first_clause(" ".join(own)))


def _first_clause(text: str) -> str:
    return re.split(r"[.:;](?: |$)", text)[0]
