"""What makes a search over grids and memory options fast, and changes none of its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpfold_train.config.compose import compose
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan import propose
from cpfold_train.plan.estimate import MEMORY_MARGIN
from cpfold_train.plan.plan import least_held, plan
from cpfold_train.plan.step import Trace, trace_step
from cpfold_train.simulate import remembered, trace
from cpfold_train.simulate.batch import assumed_batch
from cpfold_train.simulate.work_counter import MEMORY, Speed
from tests.test_plan import TINY

H100 = "h100-80gb"
FAST = ["trainer.precision=bf16-mixed", "model.recycling_steps=0", "data.max_templates=1"]
DEEP = [*TINY, "model.pairformer.num_blocks=32", "model.diffusion.token_transformer_depth=4"]


@pytest.mark.parametrize(
    ("rows", "cols", "settings"),
    [
        (2, 3, FAST),
        pytest.param(2, 3, ["parallel.fsdp=true", "trainer.precision=bf16-mixed"], marks=pytest.mark.slow),
        pytest.param(2, 2, ["memory.offload=true", "kernels=triton"], marks=pytest.mark.slow),
        pytest.param(3, 1, ["memory.recompute=false", "loss.plddt=1e-4"], marks=pytest.mark.slow),
        pytest.param(1, 2, ["compile=true", "data.max_templates=2"], marks=pytest.mark.slow),
    ],
)
def test_what_is_remembered_of_operations_changes_nothing(monkeypatch, rows, cols, settings):
    """To the last bit of memory, work, time and traffic, with times whose sums are not rounded."""
    config, grid = compose([*TINY, *settings]), Grid(rows, cols)
    speed = Speed(lambda kernel: (MEMORY, kernel.moved_bytes * 2.0**-40), lambda n_bytes, _: n_bytes * 2.0**-38)

    def step() -> Trace:
        return trace_step(config, grid, assumed_batch(config, grid), speed, on_host=False)

    # Blocks are alike, so of the first step many operations are remembered, and of a second all.
    found = [step()] if settings == FAST else [step(), step()]
    assert remembered._results
    monkeypatch.setattr(trace, "result_of", lambda func, args, kwargs: func(*args, **kwargs))
    asked = step()
    assert all(x == asked for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_a_model_of_few_blocks_holds_no_more_than_the_whole(fsdp):
    config, grid = compose([*DEEP, "crop_size=96", f"parallel.fsdp={fsdp}", "loss.plddt=1e-4"]), Grid(1, 2)
    for memory in propose.memory_presets(config, H100):
        run = replace(config, memory=memory)
        assert 0.2 * (held := plan(run, grid, H100).peak) < least_held(run, grid, H100) <= held


@pytest.mark.slow
def test_what_is_left_out_of_a_search_does_not_fit(monkeypatch):
    """On a device that the whole model just fits with the last of the memory options, and on one of half of it."""
    config, grid = compose([*DEEP, "crop_size=96"]), Grid(1, 2)
    last = propose.memory_presets(config, H100)[-1]
    peak = plan(replace(config, memory=last), grid, H100).peak / (1 - MEMORY_MARGIN)
    runs = [replace(config, memory=preset) for preset in propose.memory_presets(config, H100)]
    for memory, fits in ((peak * 1.001, True), (peak * 0.5, False)):
        monkeypatch.setattr(propose, "_limit", lambda *_, memory=memory: (1 - MEMORY_MARGIN) * memory)
        assert propose._may_any_fit(runs, grid, H100) == fits
