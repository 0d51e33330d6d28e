"""What the card reaches: memory, matrix products, exponentials, launches and links.

The rates are those that ``plan device=FILE.json`` takes; see :mod:`cpfold_train.devices`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.scope import Scope
from cpfold_train.gpu_check.timing import seconds_of
from cpfold_train.kernels.choice import is_installed

LAUNCHES = 2000


def measure_rates(record: Record, scope: Scope, gpus: int) -> None:
    """One entry a rate."""
    for name, measure in {
        "memory_bytes_s": _copy,
        "bf16_flops": lambda s: _product(s, torch.bfloat16),
        "fp32_flops": lambda s: _product(s, torch.float32),
        "tf32_flops": _tf32,
        "bf16_flops, channels of a triangle multiplication": _batched,
        "exp_s": _exponentials,
        "launch_s": _launch,
        "host_link_bytes_s, to the device": lambda s: _host_link(s, True),
        "host_link_bytes_s, to the host": lambda s: _host_link(s, False),
        "link_bytes_s": lambda s: _link(s) if gpus > 1 else None,
    }.items():
        record.attempt(name, _tell, record, scope, name, measure)


def _tell(record: Record, scope: Scope, name: str, measure: Callable[[Scope], float | None]) -> None:
    rate = measure(scope)
    if rate is not None:
        record.add(name, rate=rate)


def _seconds(scope: Scope, call: Callable[[], object]) -> float:
    return seconds_of(call, scope.device, scope.repeats)


def _copy(scope: Scope) -> float:
    """Bytes read and written."""
    x = torch.empty(scope.stream_bytes // 4, device=scope.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _seconds(scope, lambda: y.copy_(x))


def _product(scope: Scope, dtype: torch.dtype) -> float:
    x = torch.randn(scope.edge, scope.edge, device=scope.device).to(dtype)
    return 2 * scope.edge**3 / _seconds(scope, lambda: x @ x)


def _tf32(scope: Scope) -> float | None:
    """Products of fp32 that are rounded to TF32, as ``torch.set_float32_matmul_precision("high")`` allows."""
    if scope.device == "cpu":
        return None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _product(scope, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def _batched(scope: Scope) -> float:
    """32 channels of all pairs, as one rank of 2x2 has them."""
    n, channels = scope.block_tokens, 32
    x = torch.randn(channels, n, n, device=scope.device).bfloat16()
    return 2 * channels * n**3 / _seconds(scope, lambda: x @ x.mT)


def _exponentials(scope: Scope) -> float | None:
    """Exponentials of numbers that stay in registers; those of a tensor are bound by its memory."""
    if scope.device == "cpu":
        x = torch.randn(scope.edge, scope.edge)
        return x.numel() / _seconds(scope, lambda: torch.exp2(x))
    if not is_installed("triton"):
        return None
    from cpfold_train.gpu_check.exponentials import exponentials, exponentials_of

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return exponentials_of(multiprocessors) / _seconds(scope, lambda: exponentials(multiprocessors))


def _launch(scope: Scope) -> float:
    """Seconds of the host for a small kernel, dispatch by torch included."""
    x = torch.zeros(1, device=scope.device)
    count = LAUNCHES if scope.device == "cuda" else 10

    def post() -> None:
        for _ in range(count):
            x.add_(1)

    post()
    if scope.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    post()
    seconds = time.perf_counter() - start
    if scope.device == "cuda":
        torch.cuda.synchronize()
    return seconds / count


def _host_link(scope: Scope, to_device: bool) -> float | None:
    """Bytes a second between pinned memory and the device, in one direction."""
    if scope.device == "cpu":
        return None
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    own = torch.empty(host.shape, dtype=torch.uint8, device=scope.device)
    target, source = (own, host) if to_device else (host, own)
    return host.nbytes / _seconds(scope, lambda: target.copy_(source, non_blocking=True))


def _link(scope: Scope) -> float:
    """Bytes a second from the first GPU to the second."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    y = torch.empty(x.shape, dtype=torch.uint8, device="cuda:1")
    return x.nbytes / _seconds(scope, lambda: y.copy_(x))
