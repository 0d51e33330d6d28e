"""Random draws that do not depend on the grid.

A draw is a pure function of a key and a position: the key says which sample and which site of the program asks, the
position is the *global* index of the token or sequence. Every rank can thus draw its own part of a mask that is the
same on 1x1 and on 3x3, and a recomputed block draws what it drew before.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
used as a counter-based hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """64-bit key of a sequence of integers and strings, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator keyed by integers and strings: for crops, MSA rows and other draws made in data workers."""
    return np.random.default_rng(key_of(*parts) & _MASK64)


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, with wrap-around multiplication."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


class RandomStreams:
    """A family of random streams, one for each sample of the batch; or those of several sites at once.

    A draw takes some twenty small operations, however many sites and positions there are: what many layers draw is
    drawn for all of them together.

    Args:
        keys: (..., B) int64, one key a sample; of several sites in the dims before.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def at(self, *site: int | str) -> RandomStreams:
        """The independent family that belongs to a site: ``draws.at("msa_module", 3)``."""
        return RandomStreams(_mix(self.keys ^ key_of(*site)))

    def each(self, *site: int | str, last: Sequence[int | str]) -> RandomStreams:
        """The families ``at(*site, x)`` of all x of ``last``, keys (..., len(last), B)."""
        if not last:
            return RandomStreams(self.keys[..., None, :][..., :0, :])
        # Not from a tensor of the sites' keys: the copy of that to a GPU would wait for it.
        return RandomStreams(_mix(torch.stack([self.keys ^ key_of(*site, x) for x in last], -2)))

    def copies(self, count: int) -> RandomStreams:
        """Independent families for ``count`` copies of each sample, in the order of ``repeat_interleave(count, 0)``."""
        return RandomStreams(self.each("copy", last=range(count)).keys.mT.flatten(-2))

    def uniform(self, start: int, stop: int) -> Tensor:
        """Positions ``start ... stop - 1`` of each stream, (..., B, stop - start) float32 in [0, 1)."""
        position = torch.arange(start + 1, stop + 1, device=self.keys.device)
        bits = _mix(self.keys[..., None] + position * _signed(_GOLDEN))
        return _shift_right(bits, 40).to(torch.float32) * 2.0**-24

    def normal(self, start: int, stop: int) -> Tensor:
        """Positions ``start ... stop - 1`` of each stream, (..., B, stop - start) float32 standard normal (Box-Muller).

        Logarithm and cosine are in fp64, where libraries differ in the last bit: rounded to fp32 they agree but for
        about one draw in 2^28, of which devices may differ in the last bit. :meth:`uniform` is exact everywhere.
        """
        first, second = self.uniform(2 * start, 2 * stop).double().unflatten(-1, (-1, 2)).unbind(-1)
        # 1 - u is never zero.
        return ((-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * torch.pi * second)).float()
