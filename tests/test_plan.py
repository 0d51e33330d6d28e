"""Plans of tiny runs, held against the same step done for real."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.__main__ import main
from cpfold_train.cli.train import CHOSEN_MEMORY, _chosen_memory
from cpfold_train.config.compose import compose, read_request
from cpfold_train.config.memory_default import Room, room_of, with_default_memory
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.world import World
from cpfold_train.errors import ConfigError
from cpfold_train.kernels.choice import Choice
from cpfold_train.model.config import MemoryConfig
from cpfold_train.ops import offload
from cpfold_train.parallel.grid import Grid
from cpfold_train.plan import capacity, memory_options, propose
from cpfold_train.plan.depth import FEWEST, by_category, extrapolated, shallow
from cpfold_train.plan.estimate import MEMORY_MARGIN, Costs
from cpfold_train.plan.forward import trace_prediction, trace_validation
from cpfold_train.plan.plan import Plan, peak_moment, weight_bytes
from cpfold_train.plan.step import Trace, build, trace_step
from cpfold_train.predict.predictor import Predictor, Settings
from cpfold_train.simulate.batch import assumed_batch, batches_of_data, feature_bytes
from cpfold_train.simulate.shortened import Shortened
from cpfold_train.simulate.trace import Tracer
from cpfold_train.simulate.work_counter import MEMORY, Speed, WorkCounter, totals
from cpfold_train.training.fsdp import BLOCKS, shard_model
from cpfold_train.training.module import CoFoldingModule
from tests.test_training_runs import SMALL

TINY = [*SMALL, "data.val=[]", "optim.ema_decay=0", "kernels=torch"]


CHOSEN = Choice("torch", "as asked for")


A_MICROSECOND = Speed(lambda kernel: (MEMORY, 1e-6), lambda n_bytes, messages: 0.0)


@lru_cache
def traced(grid: Grid, settings: tuple[str, ...] = ()) -> Trace:
    config = compose([*TINY, *settings])
    (batch,) = batches_of_data(config, grid, 1)
    return trace_step(config, grid, batch, A_MICROSECOND, on_host=False)


def real_step(cp, config: TrainConfig) -> dict[str, int]:
    """Bytes that a rank sends in a step, by operation."""
    (batch,) = batches_of_data(config, cp.grid, 1)
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    if config.parallel.fsdp:
        shard_model(module.model, cp)
    with Collectives() as collectives:
        module.micro_batch(batch, 1)["loss"].backward()
    by_op = {op: entry.sent_bytes for op, entry in cp.ledger.by_op().items() if entry.sent_bytes}
    return by_op | {"shared": collectives.sent_bytes}


class Collectives(TorchDispatchMode):
    """What a rank sends for all-gathers and reduce-scatters: its part to each of the others, or theirs to them."""

    sent_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            self.sent_bytes += abs(args[0].nbytes - args[1].nbytes)
        return out


@pytest.mark.parametrize("fsdp", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_planned_step_sends_what_a_real_one_does(ranks, fsdp):
    settings = (f"parallel.fsdp={fsdp}",)
    real = ranks.run(real_step, 2, 2, compose([*TINY, *settings]))
    planned = totals(traced(Grid(2, 2), settings).counters)
    sent = {op: size for op, size in planned.sent_bytes.items() if size}
    assert sent | {"shared": planned.fsdp_bytes} == real[0]
    assert bool(planned.fsdp_bytes) == (fsdp == "true")


def real_forward(cp, config: TrainConfig, kind: str) -> dict[str, int]:
    """Bytes that a rank sends in a validation step or a prediction, by operation."""
    (batch,) = batches_of_data(config, cp.grid, 1)
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    module.eval()
    with torch.no_grad():
        if kind == "validation":
            module.validation_step(batch | {"filler": torch.zeros(len(batch["asym_id"]), dtype=torch.bool)}, 0)
        else:
            settings = Settings(config.diffusion.samples, config.diffusion.sampling_steps, 1, 1, None, config.seed)
            Predictor(module.model, settings, writer=None).sampled(batch, cp)
    return sent_as_planned(cp.ledger.by_op().items())


def sent_as_planned(by_op) -> dict[str, int]:
    """Without what depends on the number of chains and of resolved tokens."""
    sent = {op: getattr(entry, "sent_bytes", entry) for op, entry in by_op}
    return {op: size for op, size in sent.items() if size and op not in ("confidence_scores", "metrics")}


@pytest.mark.parametrize(("kind", "trace"), [("validation", trace_validation), ("prediction", trace_prediction)])
def test_what_runs_without_gradients_sends_what_is_planned(ranks, kind, trace):
    config = compose([*TINY, "loss.plddt=1e-4", "model.recycling_steps=1", "diffusion.sampling_steps=3"])
    config = replace(config, diffusion=replace(config.diffusion, validation_steps=3, samples=2))
    real = ranks.run(real_forward, 1, 2, config, kind)
    (batch,) = batches_of_data(config, Grid(1, 2), 1)
    found = trace(config, Grid(1, 2), batch, A_MICROSECOND, on_host=False)
    assert sent_as_planned(totals(found.counters).sent_bytes.items()) == real[0]
    held = by_category(peak_moment(found)[1])
    # A prediction has weights alone; validation is between two steps, and has all that these keep.
    assert bool(held["gradients"] and held["optimizer"]) == (kind == "validation")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["alltoall", "ring"])
def test_one_message_stands_for_all_of_its_shape(monkeypatch, algorithm):
    settings = (f"cp.algorithm={algorithm}", "crop_size=26", "model.recycling_steps=0")
    short = traced(Grid(3, 3), settings)
    monkeypatch.setattr(Shortened, "each_message", lambda _, messages, shape: iter(messages))
    full = traced.__wrapped__(Grid(3, 3), settings)
    one, other = totals(short.counters), totals(full.counters)
    assert (one.sent_bytes, one.messages, one.moved_bytes) == (other.sent_bytes, other.messages, other.moved_bytes)
    assert (one.kernels, one.seconds[MEMORY]) == pytest.approx((other.kernels, other.seconds[MEMORY]))
    assert short.moments == full.moments


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_categories_are_all_of_the_peak(fsdp):
    settings = (f"parallel.fsdp={fsdp}",)
    trace = traced(Grid(2, 2), settings)
    _, moment = peak_moment(trace)
    held = by_category(moment)
    assert sum(held.values()) == max(sum(moment.values()) for moment in trace.moments.values())
    config = compose([*TINY, *settings])
    module = build(config)
    expected = weight_bytes(module, config, Grid(2, 2))
    if fsdp == "true":
        # They are zeroed before the backward pass, and come back block by block.
        assert 0 < held["gradients"] <= expected.pop("gradients")
    assert {name: held[name] for name in expected} == expected
    assert held["features"] == feature_bytes(batches_of_data(config, Grid(2, 2), 1)[0])
    assert held["activations"] and held["boundaries"]


def test_sharing_weights_out_holds_a_quarter_and_what_is_gathered():
    whole = build(compose(TINY))
    size = sum(x.nbytes for x in whole.parameters())
    largest = max(sum(x.nbytes for x in block.parameters()) for block in whole.modules() if isinstance(block, BLOCKS))
    blocks = sum(x.nbytes for block in whole.modules() if isinstance(block, BLOCKS) for x in block.parameters())
    shared = [by_category(moment) for moment in traced(Grid(2, 2), ("parallel.fsdp=true",)).moments.values()]
    assert {held["parameters"] for held in shared} == {shared[0]["parameters"]}
    assert size / 4 <= shared[0]["parameters"] < size / 3
    # What is in no block, a block, and the next one that is fetched ahead of it.
    assert max(held["gathered"] for held in shared) <= size - blocks + 2.5 * largest
    assert size / 4 <= max(held["gradients"] for held in shared) < size / 3


def deep_and_extrapolated(*settings: str) -> tuple[Trace, Trace]:
    """A step of a deep model with four templates, and what two shallow models with fewer say of it."""
    groups, grid = {"trunk": 6, "structure_module": 5, "confidence_module": 2}, Grid(1, 2)
    few = ("data.max_templates=4",)
    deep = compose(
        [
            *TINY,
            *few,
            *settings,
            f"model.pairformer.num_blocks={groups['trunk']}",
            f"model.diffusion.token_transformer_depth={groups['structure_module']}",
            f"model.confidence.pairformer.num_blocks={groups['confidence_module']}",
        ]
    )

    def trace(config: TrainConfig) -> Trace:
        return trace_step(config, grid, assumed_batch(config, grid), A_MICROSECOND, on_host=False)

    known = weight_bytes(build(deep), deep, grid) | {"features": feature_bytes(assumed_batch(deep, grid))}
    shallower, deeper = trace(shallow(deep, FEWEST)), trace(shallow(deep, FEWEST + 1))
    return trace(deep), extrapolated(shallower, deeper, groups, 4, known)


def test_shallow_models_have_as_many_blocks_as_they_are_asked_for():
    deep = compose([*TINY, "model.pairformer.num_blocks=16", "model.confidence.pairformer.num_blocks=3"])
    found = shallow(deep, FEWEST + 1).model
    assert (found.pairformer.num_blocks, found.confidence.pairformer.num_blocks) == (FEWEST + 1, 3)
    assert found.pairformer == replace(deep.model.pairformer, num_blocks=FEWEST + 1)
    by_two = replace(deep, memory=replace(deep.memory, blocks_at_once=2))
    assert shallow(by_two, FEWEST).model.pairformer.num_blocks == 2 * FEWEST


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["memory.offload=true", "parallel.fsdp=true"])
def test_a_deep_model_from_two_shallow_ones(setting):
    full, found = deep_and_extrapolated(setting)
    assert peak_moment(found) == peak_moment(full)
    one, other = totals(found.counters), totals(full.counters)
    assert (one.kernels, one.moved_bytes) == pytest.approx((other.kernels, other.moved_bytes))
    assert (one.flops, one.sent_bytes) == (other.flops, other.sent_bytes)
    # Rows are rounded up to the number of ranks.
    assert one.fsdp_bytes == pytest.approx(other.fsdp_bytes, rel=1e-3)
    held, expected = ({phase: sum(moment.values()) for phase, moment in x.moments.items()} for x in (found, full))
    # With few blocks, or two templates, some phases do not yet have their peak where the deep model has it.
    assert held == pytest.approx(expected, rel=0.04)
    assert sum(held[phase] == pytest.approx(size) for phase, size in expected.items()) >= len(expected) - 2


def test_the_host_keeps_what_goes_there(monkeypatch):
    kept, init = [], offload._Kept.__init__

    def counted(self, x, before):
        kept.append(x.nbytes)
        init(self, x, before)

    monkeypatch.setattr(offload._Kept, "__init__", counted)
    config = compose([*TINY, "memory.offload=true", "trainer.accumulate_grad_batches=3"])
    work = totals(traced(Grid(1, 2), ("memory.offload=true",)).counters)
    costs = SimpleNamespace(work=WorkCounter().plus(work, 3))
    assert kept and Plan(config, Grid(), "x", 1, {}, "trunk", costs, 1, CHOSEN).host_memory == sum(kept)


def planned(config: TrainConfig, grid: Grid, device: str) -> Plan:
    """A plan by a rule of thumb."""
    memory = config.memory
    tiles = 64 if not memory.recompute else 16 / memory.blocks_at_once + 4
    held = tiles * 2**32 / grid.cp_size * (0.5 if memory.offload else 1)
    costs = SimpleNamespace(step_s=100 / grid.cp_size + (1 if memory.recompute else 0) + memory.blocks_at_once)
    return Plan(config, grid, device, 1, {("activations", "trunk"): held}, "trunk", costs, 80e9, CHOSEN)


def test_what_is_proposed_fits_and_is_the_cheapest(monkeypatch):
    monkeypatch.setattr(propose, "plan", planned)
    config = compose([*TINY, "crop_size=256"])
    found = propose.propose(config, "h100-80gb", 8, dp=1, choose=True)
    assert all(p.peak <= (1 - MEMORY_MARGIN) * p.memory for p in found)
    assert [p.costs.step_s for p in found] == sorted(p.costs.step_s for p in found)
    assert {p.grid.cp_size for p in found} == {1, 2, 4, 8}
    chosen = {p.grid.cp_size: p.config.memory for p in found}
    assert not chosen[4].recompute and chosen[2].recompute and chosen[2] != chosen[1]
    with pytest.raises(ConfigError, match="crop_size"):
        propose.choose_memory(replace(config, crop_size=100_000), Grid(), "h100-80gb")


def test_no_more_is_kept_than_memory_auto_has_planned(monkeypatch):
    monkeypatch.setattr(propose, "plan", planned)
    config, room = compose([*TINY, "crop_size=256"]), Room(80e9, 250e9, "triton")
    for device in ("h100-80gb", "cpu"):
        chosen = replace(config, memory=propose.choose_memory(config, Grid(1, 2), device))
        where = room if device != "cpu" else None
        assert with_default_memory(chosen, Grid(1, 2), where) == chosen


def test_what_would_fit_with_fsdp_is_told(monkeypatch):
    """On a device that is full without it."""

    def full(config: TrainConfig, grid: Grid, device: str) -> Plan:
        found = planned(config, grid, device)
        return replace(found, memory=found.peak * (2 if config.parallel.fsdp else 1))

    monkeypatch.setattr(propose, "plan", full)
    config = compose([*TINY, "crop_size=256"])
    with pytest.raises(ConfigError, match="parallel\\.fsdp=true"):
        propose.choose_memory(config, Grid(1, 2), "h100-80gb")
    with pytest.raises(ConfigError, match="grid"):
        propose.choose_memory(config, Grid(), "h100-80gb")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "memory_option"),
    [
        ("32-true", "memory.recompute=true"),
        ("32-true", "memory.recompute_updates=true"),
        ("bf16-true", "memory.recompute=true"),
        ("32-true", "memory.recompute=false"),
        ("bf16-true", "memory.recompute=false"),
        ("32-true", "memory.residual=bf16"),
    ],
)
def test_what_fits_is_not_ruled_out_before_it_is_planned(monkeypatch, precision, memory_option):
    """With a device that has just the memory for the plan."""
    settings = [*TINY, f"trainer.precision={precision}", "cp.grid=1x1", "crop_size=48", "model.pairformer.num_blocks=8"]
    config = compose([*settings, memory_option])
    device = SimpleNamespace(memory=traced_plan(config) / (1 - MEMORY_MARGIN))
    monkeypatch.setattr(propose, "find_device", lambda *_: device)
    assert propose.may_fit(config, Grid(), "gpu")


def test_nothing_is_ruled_out_where_parts_are_frozen():
    """Without gradients before it the first trained block is the first that keeps anything."""
    config = compose(["model=boltz2", "crop_size=3072"])
    assert not propose.may_fit(config, Grid(1, 2), "h100-80gb")
    frozen = replace(config, finetune=replace(config.finetune, train=["confidence_module"]))
    assert propose.may_fit(frozen, Grid(1, 2), "h100-80gb")


def traced_plan(config: TrainConfig) -> float:
    """Bytes at the peak."""
    trace = trace_step(config, Grid(), assumed_batch(config, Grid()), A_MICROSECOND, on_host=False)
    return sum(peak_moment(trace)[1].values())


def test_memory_presets_save_ever_more():
    """On CPU there is no other memory to go to; on a GPU what goes to the host costs less than what is done twice."""
    config = compose(["model=boltz2", "diffusion.multiplicity=16"])
    plain = MemoryConfig(offload=False, keep_attention=False)
    on_cpu, on_gpu = propose.memory_presets(config, "cpu"), propose.memory_presets(config, "h100-80gb")
    assert on_cpu[0] == on_gpu[0] == MemoryConfig(recompute=False)
    # 16 + 4 are kept; in groups of 8 it would be 8 + 8.
    assert on_cpu[1:3] == [MemoryConfig(), MemoryConfig(blocks_at_once=4)]
    kept = [replace(plain, keep_attention=True), plain, replace(plain, offload=True, keep_attention=True)]
    assert on_gpu[1:5] == [*kept, replace(plain, offload=True)]
    assert on_gpu[-1].blocks_at_once == 4 and on_gpu[-1].residual == "bf16"
    for presets in (on_cpu, on_gpu):
        assert len(presets) == len({repr(preset) for preset in presets})


@pytest.mark.parametrize(
    ("settings", "grid", "first"),
    [
        (["crop_size=1536"], Grid(2, 2), {"keep_attention": True}),
        (["crop_size=3072"], Grid(2, 2), {"offload": True, "keep_attention": True}),
        # No room for attention on the host of eight ranks.
        (["crop_size=6144"], Grid(4, 4), {"offload": True}),
        (["crop_size=3072", "kernels=cuequivariance"], Grid(2, 2), {"offload": True}),
    ],
)
def test_memory_auto_begins_with_what_a_run_does_by_default(monkeypatch, settings, grid, first):
    """Where the device has room for it and not for all activations."""

    def on_device(config: TrainConfig, *_: object) -> bool:
        return config.memory.recompute and (config.memory.offload or config.crop_size < 3000)

    monkeypatch.setattr(propose, "may_fit", on_device)
    monkeypatch.setattr(propose, "plan", lambda config, *_: SimpleNamespace(fits=True, config=config))
    config = compose(["recipe=finetune_boltz2_large_crop", "data.crop_schedule=null", *settings])
    chosen = propose.choose_memory(config, grid, "h100-80gb")
    assert chosen == replace(MemoryConfig(offload=False, keep_attention=False), **first)
    if chosen.offload:
        assert with_default_memory(config, grid, room_of(config, grid, "h100-80gb")).memory == chosen


def test_settings_are_those_of_a_run():
    request = read_request([*TINY, "device=l40s", "cp.grid=2x3", "dp=2"])
    assert (request.grid, request.device, request.choose) == (Grid(2, 3, 2), "l40s", False)
    assert read_request([*TINY, "cp.grid=auto"]).grid is None
    assert read_request([*TINY, "memory=auto", "cp.grid=1x2"]).choose
    assert not read_request([*TINY, "memory.recompute=false"]).choose
    assert read_request([*TINY, "dp=2"]).dp == 2
    assert {grid.world_size for grid in propose.grids(768, 8, dp=2)} == {2, 4, 8}
    assert compose([*TINY, "data.crop_schedule={1: 32, 3: 48}"]).crop_size == 48


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["device=h900", "cp.grid=1x1"], "device=h100-80gb"),
        (["crop=96"], "crop"),
        (["gpus=none"], "gpus=8"),
        (["cp.grid=2x2", "dp=3", "gpus=8"], "12"),
        (["recipe=finetune_boltz2_large_crop", "gpus=8"], "cp.grid=auto"),
        (["device"], "device="),
        (["kernels=cuequivariance"], "trainer.precision=32-true"),
        (["cp.grid=2by2"], "cp.grid=2by2"),
    ],
)
def test_what_cannot_be_planned_is_told(settings, sentence, capsys):
    assert main(["plan", *settings]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_without_scores_moves_less():
    settings = ("cp.algorithm=alltoall", "trainer.precision=bf16-mixed", "model.recycling_steps=0")
    traces = (traced(Grid(2, 2), (*settings, f"kernels={kernels}")) for kernels in ("torch", "cuequivariance"))
    plain, fused = (totals(trace.counters) for trace in traces)
    # Triton's kernels, which go with it, make other products again.
    assert sum(fused.flops.values()) == pytest.approx(sum(plain.flops.values()), rel=0.1)
    assert fused.exps > 0
    # Rows are sent normalised, in bf16.
    assert fused.messages == plain.messages
    assert all(size <= plain.sent_bytes[op] for op, size in fused.sent_bytes.items())
    assert fused.moved_bytes < plain.moved_bytes and fused.kernels < plain.kernels


def test_the_table_goes_on_where_it_was_interrupted(monkeypatch, tmp_path, capsys):
    planned_cells = []

    def counted(config: TrainConfig, grid: Grid, device: str) -> Plan:
        planned_cells.append((config.crop_size, grid.cp_size))
        if len(planned_cells) == 4:
            raise KeyboardInterrupt
        size = (config.crop_size / 768) ** 2 / grid.cp_size
        held = {("activations", "trunk"): size * 2**30 * (1 if config.memory.offload else 4)}
        costs = Costs(WorkCounter(), {}, 0, 0, 0, 0, 0, step_s=size)
        return Plan(config, grid, device, 1, held, "trunk", costs, 80e9, CHOSEN)

    monkeypatch.setattr(propose, "plan", counted)
    monkeypatch.setattr(propose, "may_fit", lambda *_: True)
    command = ["plan", *TINY, "gpus=16", "data.crop_schedule={9: 32}", "--table", str(tmp_path / "table")]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert main(command) == 0
    done = [cell for cell in planned_cells if planned_cells.count(cell) == 1]
    assert len(done) > 3 and planned_cells[3] == planned_cells[4]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| crop | 1 GPU | 4 GPUs | 16 GPUs |"
    assert table[2 + len(capacity.CROPS)] == "(0) memory.recompute=false"
    # 4 GiB with all memory options but offload, and 256 GiB, which even offload makes no smaller than 64.
    assert "4 GiB, 1 s (0)" in table[2] and table[5].count("64 GiB, 64 s") == 1 and "| - |" in table[6]
    assert (tmp_path / "table.png").stat().st_size > 0
    assert main(["plan", "device=l40s", *command[1:]]) == 2
    assert str(tmp_path / "table") in capsys.readouterr().err


def test_memory_options_are_planned_each_alone_and_together(monkeypatch, capsys):
    taken = []

    def planned_as_typed(config: TrainConfig, grid: Grid, device: str) -> Plan:
        taken.append(config)
        return planned(config, grid, device)

    monkeypatch.setattr(memory_options, "plan", planned_as_typed)
    settings = [*TINY, "cp.grid=1x2", "model.pairformer.num_blocks=8", "diffusion.multiplicity=8"]
    assert main(["plan", *settings, "--memory-options"]) == 0
    memories = [config.memory for config in taken]
    assert memories[0] == MemoryConfig() and memories[1] == MemoryConfig(recompute=False)
    assert memories[2] == MemoryConfig(blocks_at_once=2) and memories[6] == MemoryConfig(keep_attention=True)
    assert memories[7] == MemoryConfig(samples_at_once=2)
    assert [config.parallel.fsdp for config in taken].count(True) == 2
    together = MemoryConfig(recompute_updates=True, residual="bf16", offload=True, samples_at_once=2)
    assert memories[-1] == together and taken[-1].parallel.fsdp
    assert "parallel.fsdp=true" in capsys.readouterr().out
    assert main(["plan", *TINY, "--memory-options"]) == 2
    assert "type cp.grid=2x2" in capsys.readouterr().err


def test_json_has_the_numbers_of_the_table(capsys):
    # An option may stand between keys.
    assert main(["plan", *TINY, "cp.grid=1x1", "--json", "model.msa.msa_blocks=0"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    wanted = "parameters peak_memory_gib by_category sent_mib_per_step flops step_s_estimate fits launches"
    assert set(wanted.split()) <= numbers.keys()
    assert numbers["kernels"]["name"] == "torch" and numbers["of"] == "one optimizer step"
    operations = numbers["by_operation"]
    assert sum(x["seconds"] for x in operations) == pytest.approx(numbers["step_s_estimate"], rel=0.01)
    assert sum(x["launches"] for x in operations) == pytest.approx(numbers["launches"], abs=len(operations))
    assert sum(numbers["launches_by_module"].values()) == pytest.approx(numbers["launches"], abs=len(operations))
    bounds = {"matrix units", "memory", "L2 cache", "exponentials", "link", "launches"}
    assert {x["bound_by"] for x in operations} <= bounds
    assert numbers["peak_memory_gib"] == pytest.approx(sum(numbers["by_category"].values()))
    assert numbers["sent_mib_per_step"] == 0 and numbers["fits"]


def test_a_prediction_is_planned_on_one_grid_and_in_its_precisions(capsys):
    plain = ["--predict", "--json", *TINY, "model.msa.msa_blocks=0"]
    assert main(["plan", *plain, "cp.grid=1x2", "diffusion.sampling_steps=4"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["of"] == "the prediction of one query" and numbers["gradients_mib_per_step"] == 0
    assert numbers["by_category"]["optimizer"] == 0 and numbers["by_category"]["parameters"] > 0
    assert main(["plan", *plain]) == 2
    assert "type cp.grid=2x2" in capsys.readouterr().err
    assert main(["plan", *plain, "cp.grid=1x1", "trainer.precision=bf16-true"]) == 2
    assert "trainer.precision=32-true" in capsys.readouterr().err


def test_ranks_that_a_run_starts_take_the_memory_options_that_it_has_chosen(monkeypatch):
    chosen = []
    monkeypatch.setattr(propose, "choose_memory", lambda *_: chosen.append(1) or MemoryConfig(offload=True))
    # So that what is set is taken away again.
    monkeypatch.setenv(CHOSEN_MEMORY, "")
    config = compose([*TINY, "memory=auto"])
    assert [_chosen_memory(config, World(Grid(), 1, 1), "cpu") for _ in range(2)] == [MemoryConfig(offload=True)] * 2
    assert chosen == [1]


@pytest.mark.slow
def test_a_run_takes_the_memory_options_that_the_planner_chooses(forked_runs, tmp_path):
    run = [*TINY, "memory=auto", "cp.grid=1x1", "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
    done = forked_runs.run(1, [*run, f"hydra.run.dir={tmp_path}"])
    assert done.returncode == 0, done.stderr
    # There is room for everything.
    assert OmegaConf.load(tmp_path / "resolved.yaml").memory.recompute is False


def test_bytes_that_a_kernel_moves():
    """A copy reads its source and writes its target; a row that is expanded is read once; a sum reads both."""
    tracer = Tracer(Speed(lambda kernel: (MEMORY, 0.0), lambda *_: 0.0), 0)
    with FakeTensorMode(), tracer:
        x, y, row = torch.empty(8, 4), torch.empty(8, 4), torch.empty(1, 4)
        for function, moved in (
            (lambda: x.copy_(y), 2 * x.nbytes),
            (lambda: x.zero_(), x.nbytes),
            (lambda: x + row.expand(8, 4), 2 * x.nbytes + row.nbytes),
            (lambda: x.add_(x), 3 * x.nbytes),
        ):
            tracer.reset()
            function()
            assert sum(part.moved_bytes for part in tracer.so_far().values()) == moved
