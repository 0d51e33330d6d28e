"""What a plan says of time: which device, which kernels, and what bounds them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cpfold_train.devices import DEVICES, Measured, Rates, find_device, kernels_on
from cpfold_train.errors import ConfigError
from cpfold_train.kernels import choice
from cpfold_train.kernels.work import WORK, Work, work
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.layouts import tiles, whole_rows
from cpfold_train.parallel.redistribute import all_reduce, finish, start
from cpfold_train.plan.estimate import LAUNCH_S, kernel_seconds, part_costs
from cpfold_train.simulate.trace import STEP, TracedLedger, Tracer
from cpfold_train.simulate.work_counter import (
    EXPONENTIALS,
    L2,
    LAUNCHES,
    LINK,
    MATRIX,
    MEMORY,
    Kernel,
    Part,
    Speed,
    WorkCounter,
    combined,
    totals,
)

H100 = DEVICES["h100-80gb"]


@torch.library.custom_op("cpfold::test_product", mutates_args=())
def product(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """An operator whose kernel, here two operations of torch's, is not to be counted."""
    return (x @ weight).exp()


@product.register_fake
def _(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    return (x.new_empty(len(x), weight.shape[1]) + 1).exp()


def free(n_bytes: float, messages: float) -> float:
    return 0.0


def seconds_by_name(kernel: Kernel) -> tuple[str, float]:
    return MEMORY, 1.0


@pytest.fixture
def formula():
    @work("test_product")
    def _(x: Tensor, weight: Tensor, wide: bool, out: Tensor) -> Work:
        assert not wide
        return Work(2 * x.shape[0] * weight.numel(), out.numel(), None, launches=3)

    yield
    del WORK["test_product"]


def test_an_operator_of_ours_counts_as_it_says_and_what_is_inside_does_not(formula):
    tracer = Tracer(Speed(seconds_by_name, free), 0)
    with FakeTensorMode(), tracer:
        x, weight = torch.empty(5, 7), torch.empty(7, 3, dtype=torch.bfloat16)
        with tracer.times(4):
            product(x, weight)
        (x + 1).sigmoid()
    counter = totals(tracer.counters)
    assert counter.kernels == 4 * 3 + 2
    # In mixed precision products are made in the narrowest dtype that a kernel gets.
    assert counter.flops == {torch.bfloat16: 4 * 2 * 5 * 7 * 3}
    assert counter.exps == 4 * 5 * 3 + 5 * 7
    assert counter.moved_bytes == 4 * (4 * 5 * 7 + 2 * 7 * 3 + 4 * 5 * 3) + 4 * 5 * 7 * 4


def test_kernels_of_one_operator_are_planned_one_by_one(formula):
    WORK["test_product"] = lambda *_: [Work(8e14, 1e9, 1e9), Work(1e9, 1e9, 1e9, 2, l2_bytes=1e13)]
    tracer = Tracer(Speed(kernel_seconds(H100), free), 0)
    with FakeTensorMode(), tracer:
        product(torch.empty(5, 7), torch.empty(7, 3, dtype=torch.bfloat16))
    counter = totals(tracer.counters)
    assert set(counter.seconds) == {MATRIX, L2} and counter.seconds[MATRIX] == pytest.approx(8e14 / (0.5 * 989e12))
    assert (counter.kernels, counter.exps, counter.moved_bytes) == (3, 2e9, 2e9)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 4), Wide()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(self.narrow(x))


def test_work_is_counted_by_operation_forward_and_backward():
    model = nn.Module()
    model.stack = nn.Module()
    model.stack.layers = nn.ModuleList([Block(), Block()])
    tracer = Tracer(Speed(seconds_by_name, free), 0)
    with FakeTensorMode(allow_non_fake_inputs=True), tracer:
        model.to_empty(device="cpu")
        tracer.watch(model)
        tracer.reset()
        x = torch.empty(10, 4)
        for block in model.stack.layers:
            x = block(x)
        x.sum().backward()
    narrow, wide = (tracer.counters[Part("stack.layers", name)] for name in ("narrow", "wide"))
    # Autograd is where no gradient of the input is needed.
    assert sum(narrow.flops.values()) == 2 * 10 * 4 * 4 * (2 + 3)
    assert sum(wide.flops.values()) == 2 * 10 * 2 * 4 * 8 * (2 + 4)
    sides, weights = 10 * 4 * 4, 4 * (4 * 4 + 4)
    assert narrow.least_bytes == 2 * (2 * sides + weights) + 2 * (2 * (sides + weights) + sides)
    assert {part.module for part in tracer.counters} == {"stack.layers", STEP}
    assert Part("stack.layers", "") in tracer.counters


@pytest.mark.parametrize(
    ("kernel", "bound", "seconds"),
    [
        (Kernel(1e12, torch.bfloat16, 4e9), MATRIX, 1e12 / (0.5 * 989e12)),
        (Kernel(1e12, torch.bfloat16, 1e9), MATRIX, 1e12 / (0.7 * 989e12)),
        (Kernel(1e12, torch.bfloat16, 1e9, fused=True), MATRIX, 1e12 / (0.5 * 989e12)),
        # In fp32 fewer operations a byte make it large.
        (Kernel(1e12, torch.float32, 4e9), MATRIX, 1e12 / (0.7 * 67e12)),
        (Kernel(1e12, torch.float32, 4e10), MATRIX, 1e12 / (0.5 * 67e12)),
        (Kernel(1e12, torch.bfloat16, 1e10), MEMORY, 1e10 / (0.8 * 3350e9)),
        (Kernel(1e12, torch.bfloat16, 4e9, 1e11), EXPONENTIALS, 1e11 / (0.75 * 16 * 132 * 1.7e9)),
        (Kernel(1e12, torch.bfloat16, 4e9, l2_bytes=1e11), L2, 1e11 / (0.8 * 35 * 132 * 1.7e9)),
        (Kernel(0, torch.float32, 100, launches=3), LAUNCHES, 15e-6),
    ],
)
def test_what_takes_longest_bounds_a_kernel(kernel, bound, seconds):
    found, time = kernel_seconds(H100)(kernel)
    assert (found, time) == (bound, pytest.approx(seconds))
    measured = replace(H100, measured=Rates(bf16_flops=1e15, memory_bytes_s=1e15, exp_s=1e14, tf32_flops=4e14))
    assert kernel_seconds(measured)(Kernel(1e12, torch.bfloat16, 0)) == (MATRIX, pytest.approx(1e-3))
    assert kernel_seconds(measured, tf32=True)(Kernel(1e12, torch.float32, 0)) == (MATRIX, pytest.approx(2.5e-3))
    assert kernel_seconds(measured)(Kernel(1e12, torch.float32, 4e9))[1] == pytest.approx(1e12 / (0.7 * 67e12))


def test_an_operation_takes_as_long_as_its_kernels_or_their_launches():
    counter = WorkCounter(kernels=1000, seconds=Counter({MATRIX: 0.02, MEMORY: 0.01}))
    assert part_costs(counter, H100).compute_s == pytest.approx(0.03)
    assert part_costs(counter, H100).bound == MATRIX
    small = replace(counter, kernels=10_000)
    assert part_costs(small, H100).compute_s == pytest.approx(10_000 * LAUNCH_S)
    assert part_costs(small, H100).bound == LAUNCHES
    assert part_costs(small, replace(H100, measured=Rates(launch_s=1e-6))).bound == MATRIX
    costs = part_costs(replace(counter, waited_s=0.5, sent_bytes=Counter({"there": 450e9})), H100)
    assert costs.bound == LINK and costs.seconds - costs.compute_s == 0.5
    assert costs.floor_s == pytest.approx(450 / 400)


def test_parts_add_up():
    a, b = (
        {Part("a"): WorkCounter(kernels=1, exps=2)},
        {Part("a"): WorkCounter(kernels=3), Part("b"): WorkCounter(exps=5)},
    )
    both = combined(a, b, 2)
    assert (both[Part("a")].kernels, both[Part("b")].exps, totals(both).exps) == (7, 10, 12)


def test_kernels_are_those_of_the_planned_device_wherever_it_is_planned(monkeypatch):
    monkeypatch.setattr(choice, "is_installed", lambda name: pytest.fail("nobody has to have it here"))

    def chosen(device: str, precision: str) -> str:
        return kernels_on(find_device(device, 1), device, "auto", precision).name

    assert [chosen("cpu", p) for p in ("32-true", "bf16-mixed")] == ["torch", "torch"]
    assert [chosen("h100-80gb", p) for p in ("32-true", "bf16-mixed", "64-true")] == ["triton", "triton", "torch"]
    assert [chosen("b200-180gb", p) for p in ("32-true", "bf16-mixed")] == ["triton", "cuequivariance"]
    assert kernels_on(H100, "h100-80gb", "torch", "bf16-mixed") == ("torch", "as asked for")


def written(tmp_path, **changes) -> str:
    """A file as gpu-check writes it."""
    gpu = Measured("NVIDIA A100-SXM4-40GB", 42_000_000_000, [8, 0])
    rates = Rates(bf16_flops=2e14, memory_bytes_s=1.3e12, launch_s=8e-6)
    entries = {"device": asdict(gpu), "rates": asdict(rates), "phases": {"parity": "passed"}} | changes
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(entries))
    return str(file)


def test_a_device_is_what_was_measured_on_it(tmp_path):
    found = find_device(written(tmp_path), 1)
    assert (found.memory, found.capability) == (42_000_000_000, (8, 0))
    assert found.measured == Rates(bf16_flops=2e14, memory_bytes_s=1.3e12, launch_s=8e-6)
    assert "NVIDIA A100-SXM4-40GB" in found.source
    assert (found.network, found.exps) == (DEVICES["a100-80gb"].network, DEVICES["a100-80gb"].exps)
    assert kernels_on(found, "measured.json", "auto", "bf16-mixed").name == "triton"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rates": {"bf16_flops": "fast"}}, 'bf16_flops: "fast"'),
        ({"rates": {"exp_s": 0}}, "exp_s: 0"),
        ({"rates": {"launch_s": True}}, "launch_s: true"),
        ({"rates": None}, "rates"),
        ({"device": {"name": "H100"}}, "memory_bytes: null"),
        ({"device": {"name": "H100", "memory_bytes": 1, "capability": "9.0"}}, 'capability: "9.0"'),
    ],
)
def test_a_wrong_file_is_told(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match="python -m cpfold_train gpu-check") as error:
        find_device(written(tmp_path, **changes), 1)
    assert sentence in str(error.value)


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        find_device(str(tmp_path / "none.json"), 1)
    (tmp_path / "text.json").write_text("H100")
    with pytest.raises(ConfigError, match=r"text\.json"):
        find_device(str(tmp_path / "text.json"), 1)


def test_messages_travel_one_after_the_other_beside_the_computation():
    """A kernel takes 1 s, a message 10 s: of two that are posted at once, one arrives after 10 s and one after 20."""
    tracer = Tracer(Speed(seconds_by_name, lambda n_bytes, messages: 10.0 * messages), 0)
    grid = Grid(rows=1, cols=2)
    with fake_world(grid) as cp, FakeTensorMode(), tracer:
        cp.ledger = TracedLedger(tracer)
        x, has, wants = torch.empty(1, 8, 4), tiles(grid, 8, 8), whole_rows(grid, 8, 8)
        # What a rank has of its own it copies.
        first, second = (start(x, cp, cp.all, (1, 2), has, wants, "there") for _ in range(2))
        for _ in range(2):
            x.exp()
        finish(first)
        counter = tracer.counter
        assert (counter.kernels, counter.waited_s) == (5, 10 - 4)
        finish(second)
        assert (counter.kernels, counter.waited_s) == (6, 20 - 5)
        all_reduce(x, cp, cp.all, "sum")
        # A ring of two sends twice.
        assert counter.waited_s == 20 - 5 + 20
