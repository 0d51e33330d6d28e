"""Three small kernels of which it is known what the compiler makes: only for a process without Triton's interpreter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import triton
import triton.language as tl

from cpfold_train.kernels.compiled import compiled
from cpfold_train.kernels.triton.launches import Launch


@triton.jit
def product(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """exp2 of a product, over blocks of its inner dim."""
    i, k = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        a = tl.load(a_ptr + i * n + start + k)
        total += tl.exp2(tl.dot(a, tl.load(b_ptr + i * n + start + k).T))
    tl.store(out_ptr + i * BLOCK + k, total)


@triton.jit
def summed(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A sum of all blocks by an atomic."""
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0))


@triton.jit
def wide(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A row of far more numbers than a warp has registers for, normalised."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x / tl.sum(x, 0))


LAUNCHES = [
    Launch(
        "product", product, {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "n": "i32"}, {"BLOCK": 64}, 4, 3
    ),
    Launch("summed", summed, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK": 256}, 4, 1),
    Launch("wide", wide, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK": 16384}, 1, 1),
]

if __name__ == "__main__":
    print(json.dumps([asdict(compiled(launch, arch)) for arch in sys.argv[1:] for launch in LAUNCHES]))
