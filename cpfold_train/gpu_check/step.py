"""Training steps of Boltz-2 on one GPU: at the largest crop that the plan says fits, and at the largest that runs."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cpfold_train.config.check_precision import IN_BF16
from cpfold_train.config.compose import compose
from cpfold_train.config.schema import TrainConfig
from cpfold_train.errors import ConfigError
from cpfold_train.faults.mixin import is_out_of_memory
from cpfold_train.gpu_check.record import Record, release
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.gpu_check.timing import seconds_of
from cpfold_train.memory import now_mib, peak_mib, reset_peak
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid
from cpfold_train.paths import CHECKOUT
from cpfold_train.plan.estimate import MEMORY_MARGIN
from cpfold_train.plan.plan import Plan, plan
from cpfold_train.plan.propose import memory_presets
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.testing.parity import to_device
from cpfold_train.training.module import CoFoldingModule

ROWS = ("msa", "msa_mask", "has_deletion", "deletion_value", "msa_paired")
"""Features that the alignment consists of."""
RECYCLING = 1
"""Recycling passes of each step."""
SAMPLES, FULL = 4, 0.9
"""Samples of the data of which the largest is taken, and the least part of a crop that it may fill: crops end between
residues."""


def plan_and_measure(record: Record, scope: Scope, known: dict[str, Any]) -> None:
    """A step at the largest crop that the plan says fits, with the memory options that a run has by default.

    Args:
        known: ``device`` and ``rates`` of this card, with which the plan is made.
    """
    crops = scope.step_tokens
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu"
        if scope.device == "cuda":
            device = str(Path(folder) / "device.json")
            Path(device).write_text(json.dumps(known))
        first = _plan(record, scope, crops[len(crops) // 2], device)
        crop = largest_crop(first, crops)
        planned = first if crop == first.config.crop_size else _plan(record, scope, crop, device)
        while not planned.fits and crop > crops[0]:
            crop = max(other for other in crops if other < crop)
            planned = _plan(record, scope, crop, device)
    numbers = planned.as_dict()
    record.add(
        "planned",
        crop_size=crop,
        kernels=planned.config.kernels,
        peak_gib=numbers["peak_memory_gib"],
        step_s=numbers["step_s_estimate"],
        flops=numbers["flops"],
    )
    record.attempt("measured", _measure, record, scope, planned)


def _plan(record: Record, scope: Scope, crop: int, device: str) -> Plan:
    record.at(f"planning {crop} tokens")
    return plan(settings(scope, crop), Grid(), device)


def largest_crop(known: Plan, crops: tuple[int, ...]) -> int:
    """The largest of the crops that should fit, by one plan: beside weights, their gradients and Adam's two moments,
    memory grows with the crop's square."""
    fixed = 16.0 * known.parameters
    per_pair = (known.peak - fixed) / known.config.crop_size**2
    room = (1 - MEMORY_MARGIN) * known.memory - fixed
    return max((crop for crop in crops if per_pair * crop**2 <= room), default=crops[0])


def _measure(record: Record, scope: Scope, planned: Plan) -> None:
    measured = timed_step(scope, planned.config)
    record.add("measured", **measured, planned_step_s=planned.costs.step_s)


def find_largest(record: Record, scope: Scope) -> None:
    """The largest crop of which a step runs, with all memory options: doubled while it runs, then bisected in
    the time left.

    Time grows faster than the crop's square: what cannot be done within the time is left out.
    """
    leanest = memory_presets(settings(scope, scope.step_tokens[0]), "gpu" if scope.device == "cuda" else "cpu")[-1]
    ran, failed, seconds = 0, math.inf, {}
    crop = scope.step_tokens[0]
    while crop:
        needed = (crop / ran) ** 2.5 * seconds[ran] if ran else 0.0
        if record.time_left < needed:
            record.add("not tried", crop_size=crop, needed_s=needed)
            break
        outcome = _try(record, scope, crop, leanest)
        if outcome is None:
            failed = min(failed, crop)
        else:
            ran, seconds[crop] = crop, outcome
        crop = next_crop(ran, failed, scope.step_tokens)
    record.add("largest", crop_size=ran, does_not_fit=None if failed == math.inf else failed)
    if not ran:
        record.fail("largest", f"not even a crop of {scope.step_tokens[0]} tokens runs")


def next_crop(ran: int, failed: float, crops: tuple[int, ...]) -> int:
    """The crop to try next, 0 where there is none: twice the largest that ran, or halfway to the one that did not."""
    between = [crop for crop in crops if ran < crop < failed]
    if not between:
        return 0
    wanted = 2 * ran if failed == math.inf else (ran + failed) / 2
    return min(between, key=lambda crop: abs(crop - wanted))


def _try(record: Record, scope: Scope, crop: int, memory: MemoryConfig) -> float | None:
    """Seconds of a step, both of it and of what is before it; None where there is no memory for it."""
    name = f"crop_size={crop}"
    started = record.time_left
    try:
        record.add(name, **timed_step(scope, replace(settings(scope, crop), memory=memory)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record.add(name, out_of_memory=str(error).splitlines()[0][:200])
        return None
    finally:
        release()
    return started - record.time_left


def settings(scope: Scope, crop: int) -> TrainConfig:
    """The configuration of a step, on the data that come with the project."""
    shards = CHECKOUT / "data" / ("large" if scope.device == "cuda" else "shards") / "train-*.tar"
    kernels, *_ = scope.backends()
    typed = [*scope.step, f"crop_size={crop}", f"data.train=[{shards}]", "data.val=[]", f"kernels={kernels}"]
    config = compose(typed)
    return config if scope.device == "cuda" else replace(config, model=scope.model)


def timed_step(scope: Scope, config: TrainConfig) -> dict[str, float]:
    """The second of two whole steps on real data: forward and backward pass and optimizer, as Lightning does it.

    Returns:
        Real tokens of the sample, seconds, tokens a second, and GiB at the peak of both steps.
    """
    device = torch.device(scope.device)
    cp = ContextParallel(Grid(), scope.device, kernels=config.kernels)
    before = 0.0 if scope.device == "cuda" else now_mib(device)
    reset_peak(device)
    torch.manual_seed(0)
    with device:
        module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    optimizer = module.to(device).configure_optimizers()["optimizer"]
    batch = to_device(sample(config), device)

    def step() -> None:
        with torch.autocast(scope.device, torch.bfloat16, enabled=config.trainer.precision in IN_BF16):
            loss = module.micro_batch(batch, RECYCLING)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        # DistributedDataParallel has room for all of them from the start.
        optimizer.zero_grad(set_to_none=False)

    seconds, tokens = seconds_of(step, scope.device, 1), int(batch["num_tokens"])
    peak_gib = (peak_mib(device) - before) / 1024
    return {"tokens": tokens, "step_s": seconds, "tokens_a_second": tokens / seconds, "peak_gib": peak_gib}


def sample(config: TrainConfig) -> dict[str, Any]:
    """The sample of the data with most tokens, with as many alignment rows as may be: those that it has, repeated.

    Raises:
        ConfigError: it has fewer tokens than a crop.
    """
    batch = max(batches_of_data(config, Grid(), SAMPLES), key=lambda batch: int(batch["num_tokens"]))
    if batch["num_tokens"] < FULL * config.crop_size:
        raise ConfigError(f"the largest sample of the data has {int(batch['num_tokens'])} tokens")
    return batch | {name: _repeated(batch[name], config.data.max_msa_rows) for name in ROWS}


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(1, -(-count // rows.shape[1]), 1)[:, :count].contiguous()
