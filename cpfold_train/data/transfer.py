"""A batch as one tensor, for its way from a worker to the rank.

Each tensor that a worker hands over costs a file descriptor and a message, about 0.4 ms; a batch has fifty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16

Layout = dict[str, tuple[int, torch.dtype, Sequence[int]]]
"""Where each tensor lies: first byte, type and shape."""


def pack(batch: dict[str, Any]) -> tuple[Tensor, Layout, dict[str, Any]]:
    """All tensors one after the other (bytes,), where each of them is, and everything else of the batch.

    The tensors are taken out of ``batch`` one by one, so that they are not in memory twice.
    """
    layout, size = {}, 0
    for name, value in batch.items():
        if isinstance(value, Tensor):
            layout[name] = (size, value.dtype, value.shape)
            size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    flat = torch.empty(size, dtype=torch.uint8)
    for name, place in layout.items():
        _place(flat, place).copy_(batch.pop(name))
    return flat, layout, batch


def unpack(flat: Tensor, layout: Layout, rest: dict[str, Any]) -> dict[str, Any]:
    """The batch; its tensors share the memory of ``flat``."""
    return {name: _place(flat, place) for name, place in layout.items()} | rest


def _place(flat: Tensor, place: tuple[int, torch.dtype, Sequence[int]]) -> Tensor:
    start, dtype, shape = place
    return flat[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
