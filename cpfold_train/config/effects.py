"""What it does to a run that goes on, when a key has another value than before."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from cpfold_train.tables import make_table

_NEXT = "from the next step on"
_SAMPLES = "other samples or another order: the next epoch begins"
_WHERE = "changes where and how it is computed, not what"
_ROUNDING = "other rounding from the next step on"
EFFECTS = {
    "model": "must fit the weights of the checkpoint",
    "model.features": "the default of data.features",
    "model.recycling_steps": _NEXT,
    "model.init_from": "not used: the weights are the checkpoint's",
    "model.init_weights": "not used: the weights are the checkpoint's",
    "model.init_skip": "not used: the weights are the checkpoint's",
    "optim": f"{_NEXT}; Adam's moments and the position in the schedule stay",
    "optim.start_step": "moves the run to that step of the schedule, unless it goes on in its own directory",
    "finetune": "must be what the checkpoint was made with",
    "finetune.lr_groups": f"rates {_NEXT}",
    "finetune.layer_decay": f"rates {_NEXT}",
    "seed": "other draws, and another order: the next epoch begins",
    "data": f"samples {_NEXT}",
    "data.train": _SAMPLES,
    "data.sampling": _SAMPLES,
    "data.samples_per_epoch": "the next epoch begins, and has that length",
    "data.val": "scores of validation are of other samples than before",
    "data.features": "inputs that the weights were not trained with",
    "data.num_workers": _WHERE,
    "data.buckets": _WHERE,
    "crop_size": f"crops {_NEXT}",
    "batch_size": "steps of more or fewer samples; no sample of the epoch is lost",
    "dp": "steps of more or fewer samples; no sample of the epoch is lost",
    "trainer.accumulate_grad_batches": "steps of more or fewer samples; no sample of the epoch is lost",
    "trainer.max_steps": "counts from the first start of the run",
    "trainer.max_epochs": "counts from the first start of the run",
    "trainer.max_time": "counts from the first start of the run",
    "trainer.limit_train_batches": "the length of epochs, that of this one included",
    "trainer.limit_val_batches": "scores of validation are of other samples than before",
    "trainer.precision": _ROUNDING,
    "tf32": _ROUNDING,
    "kernels": _ROUNDING,
    "compile": _ROUNDING,
    "cp": _WHERE,
    "memory": _WHERE,
    "parallel": _WHERE,
    "loss": f"another loss {_NEXT}: its curve has a jump",
    "diffusion": _NEXT,
    "diffusion.validation_steps": "scores of sampled structures change with it",
}
"""By the beginning of a key; the longest one holds."""


def effect(key: str) -> str:
    """What another value of a key does."""
    parts = key.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((EFFECTS[name] for name in names if name in EFFECTS), "from now on")


def differences_table(changed: dict[str, tuple[Any, Any]]) -> Table:
    """A row for each key: its recorded value, that of now, and what the difference does."""
    table = make_table("key, before, now, effect", text="key, before, now, effect", whole="key")
    for name, (was, is_now) in changed.items():
        table.add_row(name, _shown(was), _shown(is_now), effect(name))
    return table


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
