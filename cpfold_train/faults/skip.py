"""Steps that cannot be made: skipped on all ranks alike, counted, and the end of the run where they are many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from cpfold_train.errors import RunError
from cpfold_train.faults.out_of_memory import is_out_of_memory
from cpfold_train.faults.restart import OUT_OF_MEMORY_FILE, steps_out_of_memory
from cpfold_train.parallel.gather import gather_numbers
from cpfold_train.parallel.sharding import whole

WINDOW = 100
"""Steps over which skipped ones are counted against the limit."""


class SkipBadSteps(Callback):
    """Leaves the weights and the optimizer's moments as they are in a step whose loss or gradient is not finite.

    No rank has to ask the others: a loss that is not finite makes the gradient so (``CoFoldingModule.training_step``),
    the sum over ranks spreads that to all, and the norm of the same gradient is the same everywhere.

    A step that a rank has no memory for cannot be left in the middle: the others are in exchanges that wait for it, and
    gloo does not give up an exchange such that the group can be used again (it kept ranks for up to the whole timeout).
    The run ends and the step is noted in a file. When the run starts again, all ranks skip it.

    A skipped step counts as a step: the learning rate, the crop schedule and the order of samples go on.

    Args:
        limit: skipped steps, of any ``WINDOW`` in a row, beyond which the run ends.
        run_dir: has the file of the steps that were too large; every rank must see it.

    Attributes:
        skipped: steps skipped since the start of the run, those before a resume included.
        grad_norm: norm of the gradient of the step at hand, as it came.
    """

    def __init__(self, limit: int, run_dir: Path) -> None:
        self._limit, self._run_dir = limit, run_dir
        self._too_large: set[int] = set()
        self._recent: list[int] = []
        self._bad_losses = 0
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "recent": self._recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._recent = state["skipped"], state["recent"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._too_large = steps_out_of_memory(self._run_dir)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if is_out_of_memory(exception) and trainer.training:
            with (self._run_dir / OUT_OF_MEMORY_FILE).open("a") as file:
                file.write(f"{trainer.global_step + 1}\n")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        pl_module.too_large = trainer.global_step + 1 in self._too_large

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.grad_norm.isfinite():
            return
        for parameter in pl_module.parameters():
            # What has no gradient, the optimizer leaves alone.
            parameter.grad = None
        self._count(trainer, pl_module)

    def _count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step + 1
        self.skipped += 1
        self._recent = [earlier for earlier in self._recent if earlier > step - WINDOW] + [step]
        bad_losses, self._bad_losses = int(pl_module.bad_losses) - self._bad_losses, int(pl_module.bad_losses)
        bad = gather_numbers(trainer.strategy.cp, [bad_losses])[:, 0].nonzero().flatten().tolist()
        if pl_module.too_large:
            why = f"there was no memory for it, says {self._run_dir / OUT_OF_MEMORY_FILE}"
        else:
            what = f"the loss on rank {', '.join(map(str, bad))}" if bad else "its gradient"
            why = f"{what} is not finite"
        count = f"{len(self._recent)} of the last {WINDOW} steps"
        if trainer.is_global_zero:
            print(f"step {step} was skipped: {why} ({count})", file=sys.stderr, flush=True)
        if len(self._recent) > self._limit:
            raise RunError(
                f"{count} were skipped, the last one step {step}, because {why}: where losses are not finite, type a "
                "smaller optim.lr or trainer.precision=32-true and go on from an earlier checkpoint; where "
                f"memory ends, type a smaller crop_size; or type a larger faults.max_skipped than {self._limit}"
            )
