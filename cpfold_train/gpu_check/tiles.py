"""Time and memory of a block as one rank of 2x2, which is simulated: the kernels are real, messages go nowhere.

What is sent is packed and unpacked, so all that a rank computes is there; only waiting for others is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from cpfold_train.gpu_check.blocks import BLOCKS, autocast, block, forward, inputs, trained
from cpfold_train.gpu_check.profiled import by_kernel
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.roofline import H100, ForwardBackward, Roofline, floors, least_seconds
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.gpu_check.timing import seconds_of
from cpfold_train.kernels.attention import biased_attention
from cpfold_train.memory import now_mib, peak_mib, reset_peak
from cpfold_train.parallel.context import ContextParallel, fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import Inputs

GRID = Grid(2, 2)
OPS = (
    "triangle_multiplication",
    "triangle_attention_start",
    "triangle_attention_end",
    "transition",
    "attention_pair_bias",
    "outer_product_mean",
    "pair_weighted_averaging",
)
TORCH_S = 60.0
"""What the blocks of torch's kernels take at least on a GPU, once in each pass."""
ROWS = 42
"""Rows of triangle attention that are attended at a time, for its core alone."""


def measure_blocks(record: Record, scope: Scope, measured: dict[str, float]) -> None:
    """Blocks with each of the kernels, by op with the fastest of them, and beside the stock package's.

    Args:
        measured: rates of this card, as far as they are known.
    """
    rates = reached(measured)
    record.add("rates of the floor", bf16=rates.bf16, fp32=rates.fp32, memory=rates.memory, exps=rates.exps)
    fastest, *_ = scope.backends()
    with fake_world(GRID, kernels=fastest, device_type=scope.device) as cp:
        sizes = scope.sizes(scope.block_tokens, GRID)
        of = floors(scope.model, sizes.n, sizes.msa_depth, GRID)
        for kernels in scope.backends():
            slow = scope.device == "cuda" and kernels == "torch"
            for op in BLOCKS if not slow else BLOCKS[:1]:
                for precision in ("bf16-mixed", "bf16-true") if kernels == fastest else ("bf16-mixed",):
                    name = f"{op}, {kernels}, {precision}"
                    which = op, kernels, precision, name
                    record.attempt(name, _measure, record, scope, cp, which, of, rates, seconds=TORCH_S if slow else 0)
        for op in OPS:
            name = f"{op}, {fastest}, bf16-mixed"
            record.attempt(name, _measure, record, scope, cp, (op, fastest, "bf16-mixed", name), of, rates)
    with fake_world(Grid(), kernels=fastest, device_type=scope.device) as cp:
        for op in BLOCKS:
            record.attempt(f"{op} on one rank", _beside_stock, record, scope, cp, op)


def reached(measured: dict[str, float]) -> Roofline:
    """What floors are made with: what this card has reached, and where that is not known an H100."""
    names = {"bf16": "bf16_flops", "fp32": "fp32_flops", "memory": "memory_bytes_s", "exps": "exp_s"}
    return Roofline(**{own: measured.get(name) or getattr(H100, own) for own, name in names.items()})


def _measure(
    record: Record,
    scope: Scope,
    cp: ContextParallel,
    which: tuple[str, str, str, str],
    of: dict[str, ForwardBackward],
    rates: Roofline,
) -> None:
    op, cp.kernels, precision, name = which
    module, x = block(op, scope), inputs(op, scope, scope.block_tokens, cp, precision)
    repeats = 1 if cp.kernels == "torch" else scope.repeats
    measured = passes(scope, cp, op, module, x, precision, repeats)
    least, least_trained = least_seconds(op, of, rates)
    record.add(name, **measured, floor_ms=1000 * least, trained_floor_ms=1000 * least_trained)
    if op in BLOCKS:
        told, launches = by_kernel(trained(op, module, x, cp, autocast(scope, precision)), scope.device)
        record.add(name, launches=launches, kernels=told)


def passes(
    scope: Scope, cp: ContextParallel, op: str, module: nn.Module, x: Inputs, precision: str, repeats: int
) -> dict[str, float]:
    """Milliseconds of a forward pass, and of forward pass, recomputation and backward pass; of the latter also those of
    the host's CPU, and MiB above inputs and weights."""
    device = torch.device(scope.device)

    def inferred() -> None:
        with torch.no_grad(), autocast(scope, precision):
            forward(op, module, x, cp)

    step = trained(op, module, x, cp, autocast(scope, precision))
    forward_s = seconds_of(inferred, scope.device, repeats)
    reset_peak(device)
    before, start = now_mib(device), time.process_time()
    trained_s = seconds_of(step, scope.device, repeats)
    # One more call than counts.
    host_s = (time.process_time() - start) / (repeats + 1)
    peak = peak_mib(device) - before
    measured = {"forward_ms": forward_s, "trained_ms": trained_s, "host_ms": host_s}
    return {name: 1000 * seconds for name, seconds in measured.items()} | {"peak_mib": peak}


def _beside_stock(record: Record, scope: Scope, cp: ContextParallel, op: str) -> None:
    """A block on one rank with each of our kernels, and the stock package's, with its kernels and without."""
    for kernels in scope.backends():
        cp.kernels = kernels
        x = inputs(op, scope, scope.stock_tokens, cp, "bf16-mixed")
        measured = passes(scope, cp, op, block(op, scope), x, "bf16-mixed", scope.repeats)
        record.add(f"{op} on one rank, {kernels}", tokens=scope.stock_tokens, **measured)
    if find_spec("boltz") is None:
        return
    for use_kernels in (False, True) if "cuequivariance" in scope.backends() else (False,):
        name = f"{op} on one rank, boltz{' with its kernels' if use_kernels else ''}"
        record.attempt(name, _stock, record, scope, op, name, use_kernels)


def _stock(record: Record, scope: Scope, op: str, name: str, use_kernels: bool) -> None:
    from cpfold_train.simulate.bench.stock import stock_step

    device, depth = torch.device(scope.device), scope.block_rows
    widths = {"token_s": scope.model.token_s, "token_z": scope.model.token_z, "msa_s": scope.model.msa.msa_s}
    kernels = {"use_kernels": True} if use_kernels else {}
    step = stock_step(op, widths, scope.stock_tokens, depth, torch.bfloat16, device, **kernels)
    reset_peak(device)
    before = now_mib(device)
    seconds = seconds_of(step, scope.device, scope.repeats)
    record.add(name, tokens=scope.stock_tokens, trained_ms=1000 * seconds, peak_mib=peak_mib(device) - before)


def measure_cores(record: Record, scope: Scope) -> None:
    """Triangle attention alone, some rows of it: our kernels, and torch's attention with a bias for each row."""
    n, d = scope.block_tokens, scope.model.pairformer.pairwise_head_width
    heads, dtype = scope.model.pairformer.pairwise_num_heads, torch.bfloat16
    made = torch.Generator(scope.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=scope.device, generator=made).to(dtype).requires_grad_()

    q, k, v = (random(1, ROWS, heads, n, d) for _ in range(3))
    bias = random(1, heads, n, n)
    grad = torch.randn_like(q)
    scores = ROWS * heads * n * n

    def stock() -> torch.Tensor:
        mask = bias.expand(ROWS, -1, -1, -1)
        return torch.nn.functional.scaled_dot_product_attention(q[0], k[0], v[0], attn_mask=mask, scale=1.0)[None]

    def measure(name: str, call: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            forward_s = seconds_of(call, scope.device, scope.repeats)
        both = seconds_of(lambda: torch.autograd.grad(call(), (q, k, v, bias), grad), scope.device, scope.repeats)
        record.add(
            name,
            forward_ms=1000 * forward_s,
            backward_ms=1000 * (both - forward_s),
            forward_flops=4 * scores * d / forward_s,
            backward_flops=10 * scores * d / max(1e-9, both - forward_s),
            exps_s=scores / forward_s,
        )

    for kernels in scope.backends():
        record.attempt(kernels, measure, kernels, partial(biased_attention, q, k, v, bias, kernels))
    name = "scaled_dot_product_attention"
    record.attempt(name, measure, name, stock)
