"""``train.py`` with something wrong in it: mains for :mod:`tests.forked_runs` and for processes of their own.

Each breaks this process at one point and then does what ``train.py`` does. The product has no hooks for it.
``FAULT=NAME python -m tests.faulty KEY=VALUE ...`` starts its ranks itself, as ``python train.py`` does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import psutil

from cpfold_train.cli import train as entry


def exception() -> None:
    """Rank 1 raises in its third step."""
    _on_rank_1_in_step(2, _fail)
    entry.main()


def exception_in_second_micro_batch() -> None:
    """Rank 1 raises in its third step, whose first micro-batch is done."""
    _in_step(1, 2, _fail, micro_batch=1)
    entry.main()


def killed() -> None:
    """Rank 1 is killed in its third step."""
    _on_rank_1_in_step(2, lambda batch: os.kill(os.getpid(), signal.SIGKILL))
    entry.main()


def stopped() -> None:
    """Rank 1 stops for longer than anybody waits, as a machine does whose file system hangs."""
    _on_rank_1_in_step(2, lambda batch: time.sleep(600))
    entry.main()


def frozen() -> None:
    """Rank 1 gets SIGSTOP in its third step: not even its watch goes on."""
    _on_rank_1_in_step(2, lambda batch: os.kill(os.getpid(), signal.SIGSTOP))
    entry.main()


def out_of_memory() -> None:
    """An allocation fails on rank 1 between the forward and the backward pass, where the others go on without it."""
    import torch

    def fail(step: int, losses: dict) -> dict:
        if step == 2:
            torch.empty(1 << 50)
        return losses

    _losses_on_rank_1(fail)
    entry.main()


def out_of_memory_unnoticed() -> None:
    """Rank 1 has no memory in its third step, and rank 0 stands still, as one does that waits for its GPU."""
    from cpfold_train.training.module import CoFoldingModule

    original = CoFoldingModule._losses

    def _losses(self: CoFoldingModule, *args: object) -> tuple:
        if self.trainer.training and self.global_step == 2:
            if self.trainer.global_rank == 1:
                raise MemoryError
            time.sleep(600)
        return original(self, *args)

    CoFoldingModule._losses = _losses
    entry.main()


def out_of_memory_always() -> None:
    """Rank 1 has no memory for the first step, even where the step is skipped."""

    def fail(batch: dict) -> None:
        raise MemoryError

    _on_rank_1_in_step(0, fail)
    entry.main()


def not_finite() -> None:
    """A loss of rank 1 is infinite in the second step, though its gradient is not; it is not a number in the third."""

    def spoil(step: int, losses: dict) -> dict:
        wrong = {1: losses["distogram"] + float("inf"), 2: losses["distogram"] * float("nan")}
        return losses | {"distogram": wrong.get(step, losses["distogram"])}

    _losses_on_rank_1(spoil)
    entry.main()


def nan_in_backward() -> None:
    """A loss of rank 1 is finite in the first step, and its gradient is not a number."""

    def spoil(step: int, losses: dict) -> dict:
        root = (0 * losses["distogram"]).sqrt() * 0
        return losses | {"distogram": losses["distogram"] + root} if step == 0 else losses

    _losses_on_rank_1(spoil)
    entry.main()


def bad_gradient() -> None:
    """The gradient of one weight is infinite on rank 1 in the second step, though the loss is finite."""
    import torch

    from cpfold_train.training.module import CoFoldingModule
    from cpfold_train.training.reporting.module_statistics import trained_modules

    original = CoFoldingModule.configure_optimizers

    def configure_optimizers(self: CoFoldingModule) -> dict:
        wrong = torch.inf if self.trainer.global_rank == 1 else 1.0
        weight = trained_modules(self.model)["msa_module"]["msa_module.msa_proj.weight"]
        weight.register_hook(lambda grad: grad * wrong if self.global_step == 1 else grad)
        return original(self)

    CoFoldingModule.configure_optimizers = configure_optimizers
    entry.main()


def sigterm_in_step_2() -> None:
    """SIGTERM comes to rank 0 in the last step of an epoch."""
    _in_step(0, 1, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
    entry.main()


def sigterm_in_step_3() -> None:
    """SIGTERM comes to rank 1 in the first step of an epoch, in the first of its two micro-batches."""
    _on_rank_1_in_step(2, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
    entry.main()


def _fail(batch: dict) -> None:
    raise ArithmeticError("a fault on one rank")


def _losses_on_rank_1(change: Callable[[int, dict], dict]) -> None:
    """Let ``change`` have the training step, counted from 0, and what the losses are on rank 1."""
    from cpfold_train.training.module import CoFoldingModule

    original = CoFoldingModule._losses

    def _losses(self: CoFoldingModule, *args: object) -> tuple:
        out, losses = original(self, *args)
        here = self.trainer.training and self.trainer.global_rank == 1
        return out, change(self.global_step, losses) if here else losses

    CoFoldingModule._losses = _losses


def _on_rank_1_in_step(step: int, fault: Callable[[dict], None]) -> None:
    _in_step(1, step, fault)


def _in_step(rank: int, step: int, fault: Callable[[dict], None], micro_batch: int = 0) -> None:
    """Let ``fault`` have a micro-batch of a step, both counted from 0, before the model has it."""
    from cpfold_train.training.module import CoFoldingModule

    original = CoFoldingModule.training_step

    def training_step(self: CoFoldingModule, batch: dict, batch_idx: int) -> dict:
        if self.trainer.global_rank == rank and self.global_step == step and batch_idx % 2 == micro_batch:
            fault(batch)
        return original(self, batch, batch_idx)

    CoFoldingModule.training_step = training_step


def _tell_what_is_there() -> None:
    """What this process has of an earlier start of its own: children, open files, and variables of a world."""
    names = [name for name in os.environ if name.startswith("MASTER_") or name.endswith(("RANK", "WORLD_SIZE"))]
    process = psutil.Process()
    files = process.num_fds()
    print(f"starts with {len(process.children())} children, {files} files, variables {names}", file=sys.stderr)


if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:
        _tell_what_is_there()
    globals()[os.environ["FAULT"]]()
