"""Plans of tiny runs, held against the same step done for real."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest

from cpfold_train.__main__ import main
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan import propose
from cpfold_train.plan.batch import batches_of_data
from cpfold_train.plan.compose import compose, read_request
from cpfold_train.plan.depth import FEWEST, by_category, extrapolated, shallow, totals
from cpfold_train.plan.estimate import MEMORY_MARGIN
from cpfold_train.plan.plan import Plan, fullest_moment, weight_bytes
from cpfold_train.plan.step import Trace, trace_step
from cpfold_train.training.config import TrainConfig
from cpfold_train.training.module import CoFoldingModule

TINY = [
    "data.train=[tests/data/*.tar]",
    "data.val=[]",
    "crop_size=24",
    "data.max_msa_rows=4",
    "model.token_s=16",
    "model.token_z=8",
    "model.recycling_steps=1",
    "model.msa.msa_s=8",
    "model.msa.pairwise_head_width=4",
    "model.pairformer.num_blocks=1",
    "model.pairformer.pairwise_head_width=4",
    "model.template.template_dim=8",
    "model.template.pairwise_head_width=4",
    "model.atoms.atom_s=16",
    "model.diffusion.token_transformer_depth=1",
    "diffusion.multiplicity=2",
    "optim.ema_decay=0",
]


@lru_cache
def traced(grid: Grid) -> Trace:
    config = compose(TINY)
    (batch,) = batches_of_data(config, grid, 1)
    return trace_step(config, grid, batch, lambda *_: 1e-6, on_host=False)


def real_step(cp, config: TrainConfig) -> dict[str, int]:
    """Bytes that a rank sends in a step, by operation."""
    (batch,) = batches_of_data(config, cp.grid, 1)
    module = CoFoldingModule(
        config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed
    )
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    module.micro_batch(batch, 1)["loss"].backward()
    return {op: entry.sent_bytes for op, entry in cp.ledger.by_op().items() if entry.sent_bytes}


def test_a_planned_step_sends_what_a_real_one_does(ranks):
    config = compose(TINY)
    real = ranks.run(real_step, 2, 2, config)
    planned = totals(traced(Grid(2, 2)).tallies).sent_bytes
    assert {op: size for op, size in planned.items() if size} == real[0]


def test_categories_are_all_of_the_peak():
    trace = traced(Grid(2, 2))
    _, fullest = fullest_moment(trace)
    held = by_category(fullest)
    assert sum(held.values()) == max(sum(moment.values()) for moment in trace.moments.values())
    config = compose(TINY)
    module = CoFoldingModule(
        config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed
    )
    expected = weight_bytes(module, config)
    assert {name: held[name] for name in expected} == expected
    assert held["features"] and held["activations"] and held["boundaries"]
