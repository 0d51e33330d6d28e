"""Plans of tiny runs, held against the same step done for real."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

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
from cpfold_train.plan.step import Trace, build, trace_step
from cpfold_train.training.config import TrainConfig
from cpfold_train.training.module import CoFoldingModule
from tests.test_training_runs import SMALL

TINY = [*SMALL, "data.val=[]", "optim.ema_decay=0"]


@lru_cache
def traced(grid: Grid) -> Trace:
    config = compose(TINY)
    (batch,) = batches_of_data(config, grid, 1)
    return trace_step(config, grid, batch, lambda *_: 1e-6, on_host=False)


def real_step(cp, config: TrainConfig) -> dict[str, int]:
    """Bytes that a rank sends in a step, by operation."""
    (batch,) = batches_of_data(config, cp.grid, 1)
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
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
    module = build(config)
    expected = weight_bytes(module, config)
    assert {name: held[name] for name in expected} == expected
    assert held["features"] and held["activations"] and held["boundaries"]


@pytest.mark.slow
def test_a_deep_model_from_two_shallow_ones():
    groups = {"trunk": 6, "structure_module": 5, "confidence_module": 4}
    config = compose([*TINY, "memory.offload=true", "model.template.template_blocks=1", "model.msa.msa_blocks=1"])
    model = config.model
    deep = replace(
        config,
        model=replace(
            model,
            pairformer=replace(model.pairformer, num_blocks=groups["trunk"]),
            diffusion=replace(model.diffusion, token_transformer_depth=groups["structure_module"]),
            confidence=replace(
                model.confidence,
                pairformer=replace(model.confidence.pairformer, num_blocks=groups["confidence_module"]),
            ),
        ),
    )
    (batch,) = batches_of_data(config, Grid(), 1)

    def trace(config: TrainConfig) -> Trace:
        return trace_step(config, Grid(), batch, lambda *_: 1e-6, on_host=False)

    module = build(deep)
    weights = weight_bytes(module, deep)
    found = extrapolated(trace(shallow(deep, FEWEST)), trace(shallow(deep, FEWEST + 1)), groups, weights)
    full = trace(deep)
    assert fullest_moment(found) == fullest_moment(full)
    held, expected = ({phase: sum(moment.values()) for phase, moment in x.moments.items()} for x in (found, full))
    assert held == pytest.approx(expected)
    one, other = totals(found.tallies), totals(full.tallies)
    assert (one.kernels, one.moved_bytes) == pytest.approx((other.kernels, other.moved_bytes))
    assert one.flops == other.flops


def planned(config: TrainConfig, grid: Grid, device: str) -> Plan:
    """A plan by a rule of thumb."""
    memory = config.memory
    tiles = 64 if not memory.recompute else 16 / memory.blocks_at_once + 4
    held = tiles * 2**32 / grid.cp_size * (0.5 if memory.offload else 1)
    costs = SimpleNamespace(step_s=100 / grid.cp_size + (1 if memory.recompute else 0) + memory.blocks_at_once)
    return Plan(config, grid, device, 1, {("activations", "trunk"): held}, "trunk", costs, 80e9)


def test_what_is_proposed_fits_and_is_the_cheapest(monkeypatch):
    monkeypatch.setattr(propose, "plan", planned)
    config = compose([*TINY, "crop_size=256"])
    found = propose.propose(config, "h100-80gb", 8, choose=True)
    assert all(p.peak <= (1 - MEMORY_MARGIN) * p.memory for p in found)
    assert [p.costs.step_s for p in found] == sorted(p.costs.step_s for p in found)
    assert {p.grid.cp_size for p in found} == {1, 2, 4, 8}
    chosen = {p.grid.cp_size: p.config.memory for p in found}
    assert not chosen[4].recompute and chosen[2] == MemoryConfig() and chosen[2] != chosen[1]
    with pytest.raises(ConfigError, match="type a grid of more ranks or a smaller crop_size"):
        propose.choose_memory(replace(config, crop_size=100_000), Grid(), "h100-80gb")


def test_levers_save_ever_more():
    rungs = propose.ladder(64, 16)
    assert rungs[0] == MemoryConfig(recompute=False) and rungs[1] == MemoryConfig()
    assert rungs[2] == MemoryConfig(blocks_at_once=8)
    assert len(rungs) == len({repr(rung) for rung in rungs})


def test_settings_are_those_of_a_run():
    request = read_request([*TINY, "device=l40s", "cp.grid=2x3", "dp=2"])
    assert (request.grid, request.device, request.choose) == (Grid(2, 3, 2), "l40s", False)
    assert read_request([*TINY, "cp.grid=auto"]).grid is None
    assert read_request([*TINY, "memory=auto", "cp.grid=1x2"]).choose
    assert not read_request([*TINY, "memory.recompute=false"]).choose


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["device=h900", "cp.grid=1x1"], "device=h900 is not known: type device=h100-80gb or"),
        (["crop=96"], "did you mean"),
        (["gpus=none"], "type gpus=8"),
        (["cp.grid=2by2"], "cp.grid=2by2 is not ROWSxCOLUMNS"),
    ],
)
def test_what_cannot_be_planned_is_told(settings, sentence, capsys):
    assert main(["plan", *settings]) == 2
    assert sentence in capsys.readouterr().err


def test_json_has_the_figures(capsys):
    assert main(["plan", *TINY, "cp.grid=1x1", "model.msa.msa_blocks=0", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    wanted = "parameters peak_memory_gib by_category sent_mib_per_step flops step_s_estimate fits"
    assert set(wanted.split()) <= figures.keys()
    assert figures["peak_memory_gib"] == pytest.approx(sum(figures["by_category"].values()))
    assert figures["sent_mib_per_step"] == 0 and figures["fits"]


def test_a_run_takes_the_levers_that_the_planner_chooses(forked_runs, tmp_path):
    run = [*TINY, "memory=auto", "cp.grid=1x1", "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
    done = forked_runs.run(1, [*run, f"hydra.run.dir={tmp_path}"])
    assert done.returncode == 0, done.stderr
    # There is room for everything.
    assert OmegaConf.load(tmp_path / "resolved.yaml").memory.recompute is False
