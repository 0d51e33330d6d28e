"""What an operation makes of tensors without contents, worked out once for all that are alike.

A plan does the same few thousand operations over and over: block after block, in the forward pass and where it is
recomputed, on each grid and with each of the memory options. Torch works out by rules written in Python what comes of
each. So what came of tensors of these shapes is kept for the whole process, and is made again without asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_iter


class _Result(NamedTuple):
    """A tensor that an operation returns.

    Attributes:
        given: which of the tensors given it is, where the operation works in place; else None.
        is_view: whether it shows memory of the only tensor given; else it has memory of its own.
        shape, stride, dtype, device: of the tensor.
        offset: of a view, from the offset of the tensor given.
    """

    given: int | None
    is_view: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int = 0


class _Unknown(Exception):
    """What comes of the operation is not a matter of shapes."""


Results = tuple[type | None, list[_Result | None]]
"""What is returned: a list, a tuple or a tensor alone (None), and the tensors; None among them is a None."""
_results: dict[tuple, Results | None] = {}
"""By operation and arguments; None where it has to be asked for each time."""
_attributes: WeakKeyDictionary[FakeTensorMode, dict[torch.device, dict[str, Any]]] = WeakKeyDictionary()
"""Of the tensors of a mode that are on a device."""
_FROM_ZERO = torch.ops.aten.as_strided.default
"""A view whose offset is not one from that of the tensor given."""


def result_of(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``func(*args, **kwargs)`` returns under ``FakeTensorMode``."""
    try:
        key, given = _key(func, args, kwargs)
        known = key in _results
    except (_Unknown, TypeError):
        # A tensor whose number torch knows, or an argument that cannot be a key.
        return func(*args, **kwargs)
    if not known:
        out = func(*args, **kwargs)
        _results[key] = _read(func, given, out) if _key(func, args, kwargs)[0] == key else None
        return out
    if (results := _results[key]) is None:
        return func(*args, **kwargs)
    kind, several = results
    made = [one and _make(one, given) for one in several]
    return made[0] if kind is None else kind(made)


def send(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same of a message, which returns no tensor."""
    mode = next(x.fake_mode for x in tree_iter(args) if type(x) is FakeTensor)
    with in_kernel_invocation_manager(mode):
        return func(*args, **kwargs)


def _key(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple, list[FakeTensor]]:
    """All that the results depend on, and the tensors given."""
    key: list[Any] = [func]
    given: list[FakeTensor] = []
    _describe(args, key, given)
    if kwargs:
        key.extend(kwargs)
        _describe(kwargs.values(), key, given)
    if not given:
        raise _Unknown
    return tuple(key), given


def _describe(values: Iterable[Any], key: list[Any], given: list[FakeTensor]) -> None:
    for x in values:
        kind = type(x)
        if kind is FakeTensor:
            if x.constant is not None:
                raise _Unknown
            given.append(x)
            key.append((x.shape, x.stride(), x.dtype, x.fake_device))
        elif kind is list or kind is tuple:
            key.extend((kind, len(x)))
            _describe(x, key, given)
        elif isinstance(x, Tensor):
            raise _Unknown
        else:
            # 1, 1.0 and True are equal, and results may have other dtypes.
            key.extend((kind, x))


def _read(func: OpOverload, given: list[FakeTensor], out: Any) -> Results | None:
    """The results as they can be made again, or None where they cannot."""
    kind = type(out) if isinstance(out, (list, tuple)) else None
    tensors = list(out) if kind else [out]
    if func is _FROM_ZERO or not all(x is None or type(x) is FakeTensor for x in tensors):
        return None
    try:
        several = [x if x is None else _read_one(x, given) for x in tensors]
    except _Unknown:
        return None
    own = [
        x.untyped_storage()._cdata for x, one in zip(tensors, several) if one and one.given is None and not one.is_view
    ]
    return (kind, several) if len(set(own)) == len(own) else None


def _read_one(out: FakeTensor, given: list[FakeTensor]) -> _Result:
    which = next((i for i, x in enumerate(given) if x is out), None)
    found = _Result(which, False, tuple(out.shape), out.stride(), out.dtype, out.fake_device)
    if which is not None:
        return found
    storage = out.untyped_storage()
    if any(x.untyped_storage()._cdata == storage._cdata for x in given):
        if len(given) > 1 or out.dtype != given[0].dtype:
            raise _Unknown
        return found._replace(is_view=True, offset=out.storage_offset() - given[0].storage_offset())
    if (
        out.constant is not None
        or out.storage_offset()
        or _make(found, given).untyped_storage().nbytes() != storage.nbytes()
    ):
        raise _Unknown
    return found


def _make(result: _Result, given: list[FakeTensor]) -> FakeTensor:
    if result.given is not None:
        return given[result.given]
    first, mode = given[0], given[0].fake_mode
    if result.is_view:
        with in_kernel_invocation_manager(mode):
            made = torch.as_strided(first, result.shape, result.stride, first.storage_offset() + result.offset)
    else:
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
    return _faked(made, mode, result.device)


def _faked(made: Tensor, mode: FakeTensorMode, device: torch.device) -> FakeTensor:
    """``FakeTensor(mode, made, device)``, whose attributes are the same for all."""
    of_mode = _attributes.setdefault(mode, {})
    if device not in of_mode:
        of_mode[device] = dict(vars(FakeTensor(mode, made, device)))
    faked = Tensor._make_subclass(FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=device)
    vars(faked).update(of_mode[device])
    return faked
