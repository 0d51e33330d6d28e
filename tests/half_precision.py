"""Follows coordinates, noise levels and masks of atoms through a step, and lists what of them is in half precision, and
what of them goes into matrix products."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from types import FrameType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tf32 import FACTORS

HALF = (torch.bfloat16, torch.float16)


class Kind(Enum):
    """What a tensor was made of. What is none of these, such as a feature of the sequence, may be as wide as it likes.

    Attributes:
        NUMBER: coordinates, noise levels, and all that is calculated from them: distances, errors, gradients.
        CHOICE: masks, and whole numbers and truth values that coordinates decide.
        WEIGHT: parameters, and what is made of nothing else: their casts and parts.
        ACTIVATION: what an operation with a weight in it made, and what was made of that and not of numbers.
    """

    NUMBER = auto()
    CHOICE = auto()
    WEIGHT = auto()
    ACTIVATION = auto()


SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
SHAPE_ONLY |= {"new_empty_strided"}
"""Operations whose result has nothing of their argument but its shape and dtype."""
MOVES = {"view", "alias", "expand", "permute", "slice", "select", "unsqueeze", "unbind", "cat", "stack", "_to_copy"}
"""Operations that calculate nothing, which may be done under autocast."""
ELSEWHERE = ("a backward pass", "training/module.py")
"""Autograd's own operations, which know no autocast; and where losses, numbers no longer, are weighted and summed."""


class HalfPrecision(TorchDispatchMode):
    """Sees every operation that runs, below autocast and autograd, those of the backward pass as well.

    A number stays one until an operation with a weight takes it in, or until it is a single figure (a mean loss). What
    is derived from a mask alone is a choice; a network's activation that is masked or picked stays an activation, which
    may be narrow. Memory is what is followed, so a view is what its whole is.

    Attributes:
        found: line and operation of each number or choice in half precision, and of whatever is calculated of numbers
            under autocast, whether or not this operation is one that it would round.
        numbers: operations that made numbers, so that a test can see that something was followed.
        products: line and function of each matrix product in fp32 that takes in a number; of forward passes alone,
            since a gradient is a number too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[int, Kind] = {}
        self._call = Call()
        self.found: list[str] = []
        self.numbers = 0
        self.products: list[str] = []

    def mark(self, x: Tensor, kind: Kind) -> Tensor:
        """From here on x is of a kind."""
        self._kinds[_memory(x)] = kind
        return x

    def __enter__(self) -> HalfPrecision:
        self._call.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._call.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            memory: self._kinds.get(memory) for memory in map(_memory, _tensors((*args, *(kwargs or {}).values())))
        }
        name = func.overloadpacket.__name__
        factors = [args[i] for i in FACTORS.get(func._schema.name, ())]
        if any(x.dtype == torch.float32 and given[_memory(x)] is Kind.NUMBER for x in factors):
            line = _line(sys._getframe())
            self.products += [] if line.startswith(ELSEWHERE) else [line]
        kinds = set() if name in SHAPE_ONLY else set(given.values())
        for x in _tensors((out,)):
            memory = _memory(x)
            # One element of a tensor says nothing of the others.
            if x.ndim or memory not in given:
                self._kinds[memory] = kind = _kind_of(x, kinds)
                self.numbers += kind is Kind.NUMBER
                half = x.dtype in HALF and kind in (Kind.NUMBER, Kind.CHOICE)
                mixed = self._call.mixed and kind is Kind.NUMBER and name not in MOVES
                if half or mixed:
                    line = _line(sys._getframe())
                    if half or not line.startswith(ELSEWHERE):
                        self.found.append(f"{line}: {name}, {x.dtype} of a {kind.name.lower()}")
        return out


class Call(TorchFunctionMode):
    """Whether autocast was on where the last operation was called: where operations run it is off again."""

    mixed = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.mixed = torch.is_autocast_enabled("cpu")
        return func(*args, **(kwargs or {}))


def _kind_of(x: Tensor, kinds: set[Kind | None]) -> Kind | None:
    """What an operation makes of inputs of such kinds."""
    if Kind.WEIGHT in kinds:
        return Kind.WEIGHT if kinds == {Kind.WEIGHT} else Kind.ACTIVATION
    if Kind.NUMBER in kinds:
        return Kind.CHOICE if not x.is_floating_point() else Kind.NUMBER if x.ndim else None
    return next((kind for kind in (Kind.ACTIVATION, Kind.CHOICE) if kind in kinds), None)


def _tensors(values: Sequence) -> Iterator[Tensor]:
    """Those among the arguments or results of an operation, and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _memory(x: Tensor) -> int:
    return (x._local_tensor if isinstance(x, DTensor) else x).untyped_storage()._cdata


def _line(frame: FrameType | None) -> str:
    """The innermost line of the package that led here."""
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/cpfold_train/")
        if found:
            return f"{file}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "a backward pass"
