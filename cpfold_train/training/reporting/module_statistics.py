"""Norms of each module's weights, gradients and updates."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from cpfold_train.checkpoints.boltz import boltz_name
from cpfold_train.parallel.sharding import whole
from cpfold_train.reports.metrics import MODULES
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.training.reporting.loggers import MetricsCSV
from cpfold_train.whole_file import whole_file

COLUMNS = ("step", "module", *MODULES)
Named = dict[str, nn.Parameter]


class ModuleStatistics(Callback):
    """Rows of ``modules.csv``, and W&B's ``modules/MODULE/NAME``, of the trained weights of each top-level module.

    ``gradient_norm`` is that of the gradient as it came, before clipping. ``update_ratio`` is the norm of Adam's step,
    weight decay left out, relative to that of the weights; it is 0 where the step was skipped.
    ``non_finite`` is the first weight whose gradient is not finite. Rows of the file from the first step on are
    dropped, as in ``metrics.csv``.

    It is to come before ``SkipBadSteps`` among the callbacks, which takes the gradients of such a step away.

    Args:
        path: the file.
        every_n_steps: optimizer steps between rows.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self._path, self._every = path, every_n_steps
        self._rows: list[dict[str, float | str]] = []
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self._modules = trained_modules(pl_module.model)
        optimizer.register_step_post_hook(lambda optimizer, *_: self._add_updates(optimizer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step + 1
        if step % self._every == 0:
            self._rows = [{"step": step, "module": name} | gradients(w) for name, w in self._modules.items()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if self._rows and trainer.is_global_zero:
            self._write()
            norms = {
                f"modules/{row['module']}/{name}": value
                for row in self._rows
                for name, value in row.items()
                if isinstance(value, float)
            }
            for logger in trainer.loggers:
                if not isinstance(logger, MetricsCSV):
                    logger.log_metrics(norms, step=trainer.global_step)
        self._rows = []

    def _add_updates(self, optimizer: Optimizer) -> None:
        for row in self._rows:
            row["update_ratio"] = update_norm(optimizer, self._modules[row["module"]]) / max(row["weight_norm"], 1e-30)

    def _write(self) -> None:
        if not self._begun:
            # What an earlier run in the directory did beyond the checkpoint that this one resumes from.
            kept = [row for row in read_metrics(self._path) if int(row["step"]) < self._rows[0]["step"]]
            with whole_file(self._path) as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(kept)
            self._begun = True
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(self._rows)


def trained_modules(model: nn.Module) -> dict[str, Named]:
    """The trainable parameters of each top-level module, both under Boltz-2's names."""
    modules: dict[str, Named] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = boltz_name(name)
            modules.setdefault(name.partition(".")[0], {})[name] = parameter
    return modules


def gradients(parameters: Named) -> dict[str, float | str]:
    """Norms of the gradient and of the weights, and the first weight whose gradient is not finite or an empty name."""
    given = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    total = norm(given.values())
    lost = total.isfinite().logical_not().item()
    return {
        "gradient_norm": total.item(),
        "weight_norm": norm(p.detach() for p in parameters.values()).item(),
        "non_finite": next((name for name, grad in given.items() if not norm([grad]).isfinite()), "") if lost else "",
    }


def update_norm(optimizer: Optimizer, parameters: Named) -> float:
    """Norm of AdamW's last step without weight decay, from its moments; weights without a gradient were left alone."""
    chosen = {*map(id, parameters.values())}
    steps = []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if id(p) in chosen and p.grad is not None and (state := optimizer.state[p]):
                n = state["step"].item()
                scale = (state["exp_avg_sq"] / (1 - beta2**n)).sqrt_().add_(group["eps"])
                steps.append(norm([state["exp_avg"] / scale]) * group["lr"] / (1 - beta1**n))
    return norm(steps).item()


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all of them together, in fp32 at least; of sharded ones, on all ranks."""
    norms = [whole(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))) for x in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
