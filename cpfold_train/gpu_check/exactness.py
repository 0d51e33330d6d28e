"""Whether the device gives what the CPU gives: every op and block in fp64, and the draws."""

from __future__ import annotations

import torch

from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.cases import CASES
from cpfold_train.testing.parity import Case, compared, relative_error, run

COUNT = 10**6
"""Draws that are compared."""


def compare_with_cpu(record: Record, scope: Scope) -> None:
    """Every case on 1x1 on the device and on the CPU."""
    # The first starts the process group of one rank.
    cpu = ContextParallel(Grid(), "cpu")
    own = ContextParallel(Grid(), scope.device)
    for name in scope.cases:
        record.attempt(name, _compare, record, name, CASES[name], cpu, own)


def _compare(record: Record, name: str, case: Case, cpu: ContextParallel, own: ContextParallel) -> None:
    tell(record, name, case, run(cpu, case), [run(own, case)], Grid())


def tell(record: Record, name: str, case: Case, serial: dict, parts: list[dict], grid: Grid) -> None:
    """Write the worst error of a case: of its output and all its gradients."""
    errors = {what: relative_error(*pair) for what, pair in compared(serial, parts, grid, case).items()}
    worst = max(errors, key=errors.get)
    record.add(name, error=errors[worst], worst=worst, limit=case.tolerance)
    # Not "greater", which what is not a number never is.
    if not errors[worst] <= case.tolerance:
        record.fail(name, f"the error of its {worst} is {errors[worst]:.1e}, more than {case.tolerance:.0e}")


def compare_draws(record: Record, scope: Scope) -> None:
    """Draws of the device and of the CPU, bit by bit, and a part of them against the whole.

    Uniform draws are integer arithmetic and must be equal. Normal ones go through a logarithm and a cosine, of which
    each device has its own: they may differ in the last bit of fp32.
    """
    keys = torch.tensor([3, 5 - 2**62])
    here, there = RandomStreams(keys).at("check", 1), RandomStreams(keys.to(scope.device)).at("check", 1)
    uniform = (here.uniform(0, COUNT) != there.uniform(0, COUNT).cpu()).sum().item()
    whole = there.normal(0, COUNT)
    apart = (whole[:, 1000:2000] != there.normal(1000, 2000)).sum().item()
    far = (here.normal(0, COUNT) - whole.cpu()).abs()
    record.add("uniform", differ=uniform, of=2 * COUNT)
    record.add("normal", differ=far.count_nonzero().item(), of=2 * COUNT, most=far.max().item())
    record.add("part of a stream", differ=apart, of=2000)
    if uniform or apart:
        record.fail("draws", f"{uniform} uniform ones differ from the CPU's and {apart} of a part from the whole's")
    if not far.max() <= 1e-6:
        record.fail("draws", f"a normal one is {far.max():.1e} from the CPU's")
