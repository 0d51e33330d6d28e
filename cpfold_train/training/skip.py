"""Steps without a usable gradient: skipped on all ranks alike, counted, and the end of the run where they are many."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from cpfold_train.errors import RunError
from cpfold_train.parallel.gather import gather_figures

WINDOW = 100
"""Steps over which skipped ones are counted against the limit."""


class SkipBadSteps(Callback):
    """Leaves the weights and the optimizer's moments as they are in a step whose loss or gradient is not finite.

    No rank has to ask the others: a loss that is not finite makes the gradient so (``CoFoldingModule.training_step``),
    the sum over ranks spreads that to all, and the norm of the same gradient is the same everywhere.

    A skipped step counts as a step: the learning rate, the crop schedule and the order of samples go on.

    Args:
        limit: skipped steps, of any ``WINDOW`` in a row, beyond which the run ends.

    Attributes:
        skipped: steps skipped since the start of the run, those before a resume included.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._recent: list[int] = []
        self._bad_losses = 0
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "recent": self._recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._recent = state["skipped"], state["recent"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
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
        bad = gather_figures(trainer.strategy.cp, [bad_losses])[:, 0].nonzero().flatten().tolist()
        what = f"the loss on rank {', '.join(map(str, bad))}" if bad else "its gradient"
        count = f"{len(self._recent)} of the last {WINDOW} steps"
        if trainer.is_global_zero:
            print(f"step {step} was skipped: {what} is not finite ({count})", file=sys.stderr, flush=True)
        if len(self._recent) > self._limit:
            raise RunError(
                f"{count} had a loss or a gradient that is not finite, the last one step {step}: type a smaller "
                f"optim.lr or trainer.precision=32-true and go on from an earlier checkpoint, or type a larger "
                f"faults.max_skipped than {self._limit}"
            )
