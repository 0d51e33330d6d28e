"""What the kernels of the local parts share: the LayerNorm of a tile in registers, its gradient, and the launches.

The norm's weight and bias are not here: :func:`cpfold_train.kernels.fused.folded` makes them part of the projection
that follows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cpfold_train.kernels.triton.interpret import product_type

EPS = tl.constexpr(1e-5)
AMPERE, HOPPER, BLACKWELL = 8, 9, 10
"""Major compute capabilities, whose matrix units want tiles of their own."""


class Tile(NamedTuple):
    """How a kernel is cut up: pairs and output channels at a time, warps, and stages of its pipeline."""

    pairs: int
    channels: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Of a forward pass, of the gradient of what goes in and of that of the weights."""

    forward: Tile
    backward: Tile
    weights: Tile


def tiles_for(device: torch.device, dtype: torch.dtype, tiles: dict[int, Tiles], wide: Tiles) -> Tiles:
    """Those of the GPU's major compute capability, or Ampere's where it has none; ``wide`` for products of fp32."""
    if dtype == torch.float32:
        return wide
    return tiles.get(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER, tiles[AMPERE])


def dot_constants(dtype: torch.dtype) -> dict[str, Any]:
    """``DOT`` and ``PRECISION`` of a kernel whose products take ``dtype``. fp32 is exact, unless torch's own products
    are allowed TF32."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {"DOT": product_type(dtype), "PRECISION": "tf32" if tf32 else "ieee"}


def parts(device: torch.device, slices: int, blocks: int, num_warps: int = 8) -> int:
    """Into how many parts a sum over ``blocks`` is split, so that with ``slices`` of channels all multiprocessors are
    busy: with eight warps each, which take all their registers."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(blocks, processors * 8 // num_warps // slices))


@triton.jit
def normalise(x, C: tl.constexpr, AXIS: tl.constexpr):
    """``(x - mean) / sqrt(var + eps)`` over an axis of C channels, and the second factor."""
    x = x - tl.expand_dims(tl.sum(x, AXIS) / C, AXIS)
    scale = tl.expand_dims(tl.rsqrt(tl.sum(x * x, AXIS) / C + EPS), AXIS)
    return x * scale, scale


@triton.jit
def normalise_backward(grad, normed, scale, C: tl.constexpr, AXIS: tl.constexpr):
    """Gradient of what was normalised, from that of the result."""
    mean = tl.expand_dims(tl.sum(grad, AXIS) / C, AXIS)
    along = tl.expand_dims(tl.sum(grad * normed, AXIS) / C, AXIS)
    return (grad - mean - normed * along) * scale


@triton.jit
def sigmoid(x):
    """By one exponential in base 2."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))
