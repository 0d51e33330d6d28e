"""What one rank of a step holds, computes and moves, counted while the step runs on tensors without contents."""

from __future__ import annotations

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from cpfold_train.kernels.work import NAMESPACE, WORK
from cpfold_train.parallel.ledger import Ledger
from cpfold_train.simulate.contents import found_in
from cpfold_train.simulate.remembered import result_of, send
from cpfold_train.simulate.work_counter import Kernel, Part, Speed, WorkCounter, WorkCounters

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "average",
    "features",
    "gathered",
    "boundaries",
    "activations",
    "communication",
)
"""What memory is for. ``average`` is the moving average of the weights; ``gathered`` are weights that FSDP has put
together for a while; ``boundaries`` are activations made before the block of the network that runs at the moment, and
kept; ``activations`` those of this block; ``communication`` is what is sent and received."""
STEP = "losses and optimizer"
"""What is done outside of the model's modules."""
HEAP = "freed, kept by malloc"
ELSEWHERE = "host"
"""What is kept in the memory of the host counts as nothing."""

_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "alias",
}
_PICKING = {"index", "index_select", "gather", "embedding"}
"""Operations that read of their first argument only as much as they return."""
_WRITING = {"copy_", "fill_", "zero_"}
"""Operations that write their first argument without reading it."""
WITH_EXPONENTIALS = {"exp", "exp_", "_softmax", "sigmoid", "sigmoid_", "silu", "silu_"}
"""Operations that take one of each element."""

_SCATTER = "c10d::_reduce_scatter_base_"
_COLLECTIVES = {"c10d::_allgather_base_", _SCATTER}

Phase = tuple[str, str]
"""The module whose backward pass runs, and the module that is run or recomputed."""
Moment = dict[tuple[str, str], float]
"""Bytes held by category and by the module that made them."""


class _Origin(NamedTuple):
    """What a tensor is for, the module that made it, and how many blocks had begun or ended before."""

    category: str
    module: str
    epoch: int


@dataclass
class _Peak:
    """The moment of a phase at which most is held."""

    held: float = 0
    live: dict[_Origin, int] = field(default_factory=dict)
    epoch: int = 0


class Tracer(TorchDispatchMode):
    """Counts live storages, arithmetic and traffic of everything done under it.

    Two clocks run: that of the computation, which does one kernel after the other, and that of the link, which sends
    one message after the other, none before the computation has come to where it is posted. Where the computation wants
    what has not arrived, it waits. Other ranks are taken to be as fast as this one.

    Args:
        speed: time of a kernel and of messages.
        large: tensors of fewer bytes come from a heap that grows and never shrinks, as on the host; 0 for none.

    Attributes:
        now: live bytes.
        counters: work so far, by part of the model.
    """

    def __init__(self, speed: Speed, large: int) -> None:
        super().__init__()
        self.now = 0
        self.counters: defaultdict[Part, WorkCounter] = defaultdict(WorkCounter)
        self._speed, self._large = speed, large
        self._clock = self._link = 0.0
        self._category, self._modules, self._epoch = "activations", [STEP], 0
        self._parts = [Part(STEP)]
        self._times, self._copies = 1.0, 1
        self._to_host = False
        self._entries: dict[int, tuple[_Origin, int]] = {}
        self._live: defaultdict[_Origin, int] = defaultdict(int)
        self._small = self._heap = 0
        self._phases: defaultdict[Phase, _Peak] = defaultdict(_Peak)
        self._phase, self._rising = self._phases[STEP, STEP], False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch wraps what a mode does so that nothing in it is compiled: nothing would be, and that takes time."""
        return False

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What is made inside belongs to this category."""
        before, self._category = self._category, name
        yield
        self._category = before

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """The work inside stands for so many times as much."""
        before, self._times = self._times, self._times * factor
        yield
        self._times = before

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """What is made, done and sent inside is there so many times."""
        before, self._copies = self._copies, self._copies * number
        with self.times(number):
            yield
        self._copies = before

    @contextmanager
    def over_host_link(self) -> Iterator[None]:
        """The copies inside go to the host or come from there, beside the computation."""
        before, self._to_host = self._to_host, True
        yield
        self._to_host = before

    def reset(self) -> None:
        """Forget the work done and the peaks so far."""
        self.counters.clear()
        self._phases.clear()
        self._heap = self._small
        self._enter_phase()

    def moments(self) -> dict[Phase, Moment]:
        """The peak of each phase since :meth:`reset`."""
        self._note()
        moments: dict[Phase, Moment] = {}
        for phase, peak in self._phases.items():
            moment: Counter[tuple[str, str]] = Counter()
            for origin, size in peak.live.items():
                kept = origin.category == "activations" and origin.epoch < peak.epoch
                moment["boundaries" if kept else origin.category, origin.module] += size
            if unused := peak.held - sum(moment.values()):
                moment["activations", HEAP] += unused
            moments[phase] = {key: size for key, size in moment.items() if size}
        return moments

    def so_far(self) -> WorkCounters:
        """A copy of the work done."""
        return copy.deepcopy(dict(self.counters))

    @property
    def counter(self) -> WorkCounter:
        """Of the part that is at work."""
        return self.counters[self._parts[-1]]

    def watch(self, model: nn.Module) -> None:
        """Attribute what is done to the modules of ``model``, blocks of stacks and the modules that hold them, and
        work also to the operation within them: the outermost of the modules that are called there."""
        for name, module in model.named_modules():
            parts = name.split(".")
            inside_block = any(part.isdigit() for part in parts[:-1])
            if parts[-1].isdigit() or (name and len(parts) <= 2 and not inside_block):
                label = ".".join(part for part in parts if not part.isdigit())
                module.register_forward_pre_hook(lambda *_, label=label: self._enter(label))
                module.register_forward_hook(lambda _, __, out, label=label: self._leave(out, label))
            elif name:
                last = max((i for i, part in enumerate(parts) if part.isdigit()), default=1)
                operation = ".".join(parts[last + 1 :])
                module.register_forward_pre_hook(lambda *_, name=operation: self._begin(name))
                module.register_forward_hook(self._end)

    def _enter(self, label: str) -> None:
        self._modules.append(label)
        self._parts.append(Part(label))
        self._enter_phase()

    def _leave(self, out: Any, label: str) -> None:
        self._modules.pop()
        self._parts.pop()
        self._enter_phase()
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.come_to(label))

    def come_to(self, label: str) -> None:
        """The backward pass comes to a module, or with ``STEP`` out of the model."""
        self._modules[0], self._parts[0] = label, Part(label)
        self._enter_phase()

    def _begin(self, operation: str) -> None:
        self._parts.append(self._parts[-1] if self._within else Part(self._modules[-1], operation))

    @property
    def _within(self) -> bool:
        """Whether an operation is being called; what the backward pass has come to is none."""
        return len(self._parts) > 1 and self._parts[-1].operation != ""

    def _end(self, module: nn.Module, args: tuple, out: Any) -> None:
        part, times = self._parts.pop(), self._times
        if self._within:
            return
        weights = sum(x.nbytes for x in module.parameters())
        given, made = (sum(x.nbytes for x in tree_iter(some) if isinstance(x, Tensor)) for some in (args, out))
        self.counters[part].least_bytes += times * (given + weights + made)

        def turn(_: Tensor) -> None:
            self._parts[0] = part
            self.counters[part].least_bytes += times * (2 * (given + weights) + made)

        if trained := [x for x in tree_iter(out) if isinstance(x, Tensor) and x.requires_grad]:
            trained[0].register_hook(turn)

    def _enter_phase(self) -> None:
        self._note()
        self._epoch += 1
        self._phase = self._phases[self._modules[0], self._modules[-1]]
        self._grown()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            # Asked several times an operation, and answered without the detour through the fake mode.
            return args[0].fake_device
        if DTensor in types:
            # It comes again with the tensors inside.
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.aten.nonzero.default:
            with self:
                return found_in(args[0])
        if func.namespace == "c10d":
            self._communicate(func._schema.name, args)
            return send(func, args, kwargs)
        out = result_of(func, args, kwargs)
        results = list(_tensors((out,)))
        for tensor in results:
            self._count(tensor.untyped_storage())
        if func.namespace == NAMESPACE:
            self._fused(func, args, kwargs, out)
        elif not func.is_view and (name := func._schema.name.removeprefix("aten::")) not in _NO_KERNEL:
            self._work(func, name, args, kwargs, out, results)
        return out

    def _work(self, func, name: str, args: tuple, kwargs: dict, out: Any, results: list[Tensor]) -> None:
        tensors = list(_tensors(args))
        if not tensors or not results:
            return
        if self._to_host:
            self.counter.host_bytes += self._times * sum(x.nbytes for x in results)
            return
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        first = results if name in _PICKING else [] if name in _WRITING else tensors[:1]
        exps = results[0].numel() if name in WITH_EXPONENTIALS else 0
        # Of what is expanded, memory has one copy.
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*first, *tensors[1:], *results))
        self.kernel(Kernel(flops, tensors[0].dtype, moved, exps))

    def _fused(self, func, args: tuple, kwargs: dict, out: Any) -> None:
        """Kernels of this project's: what they do is written beside them."""
        _, _, name = func._schema.name.rpartition("::")
        given = [*args, *(kwargs.get(x.name, x.default_value) for x in func._schema.arguments[len(args) :])]
        told, tensors = WORK[name](*given, out), [*_tensors(given), *_tensors((out,))]
        dtypes = {x.dtype for x in tensors if x.is_floating_point()} | {x for x in given if isinstance(x, torch.dtype)}
        # In mixed precision the products are made in the narrowest that the kernel is given.
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        for one in told if isinstance(told, list) else [told]:
            moved = sum(x.nbytes for x in tensors) if one.moved_bytes is None else one.moved_bytes
            self.kernel(Kernel(one.flops, narrowest, moved, one.exps, one.launches, True, one.l2_bytes))

    def kernel(self, kernel: Kernel) -> None:
        """Count a kernel."""
        bound, seconds = self._speed.kernel(kernel)
        self.counter.add(kernel, bound, seconds, self._times)
        self._clock += self._times * seconds

    def send(self, op: str, n_bytes: int, messages: int) -> None:
        """Count messages that are sent from now on."""
        n_bytes, messages = self._copies * n_bytes, self._copies * messages
        self.counter.sent_bytes[op] += n_bytes
        self.counter.messages[op] += messages
        self._link = self.arrival() + self._speed.messages(n_bytes, messages)

    def arrival(self) -> float:
        """When all has arrived that has been sent so far."""
        return max(self._link, self._clock)

    def wait(self, until: float) -> None:
        """The computation goes on when the clock of the link has come there."""
        self.counter.waited_s += max(0.0, until - self._clock)
        self._clock = max(self._clock, until)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._entries or self._category == ELSEWHERE:
            return
        self._hold(key, _Origin(self._category, self._modules[-1], self._epoch), self._copies * storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _communicate(self, name: str, args: tuple) -> None:
        """A message is no activation, whichever module made it."""
        tensors = [x for x in tree_iter(args) if isinstance(x, Tensor)]
        for tensor in tensors:
            self._belongs(tensor.untyped_storage(), "communication")
        if name in _COLLECTIVES:
            # Of FSDP: all else is sent as single messages. What others get of each rank is its part of the whole.
            parts = sorted(x.nbytes for x in tensors)
            self.counter.fsdp_bytes += self._times * (parts[-1] - parts[0])
            if name == _SCATTER:
                self._belongs(tensors[0].untyped_storage(), "gradients")

    def _belongs(self, storage: torch.UntypedStorage, category: str) -> None:
        """What was taken for an activation, or for a message, is something else."""
        key = storage._cdata
        if key in self._entries and self._entries[key][0].category in ("activations", "communication"):
            origin, size = self._drop(key)
            self._hold(key, origin._replace(category=category), size)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size than when it was made: FSDP frees gathered weights so, and makes room for them."""
        if storage._cdata not in self._entries:
            # Of what torch makes for itself.
            return
        self._note()
        origin, _ = self._drop(storage._cdata)
        self._hold(storage._cdata, origin._replace(epoch=self._epoch), storage.nbytes())

    def _forget(self, key: int) -> None:
        self._note()
        self._drop(key)

    def _hold(self, key: int, origin: _Origin, size: int) -> None:
        self._entries[key] = origin, size
        self._live[origin] += size
        self.now += size
        if size < self._large:
            self._small += size
            self._heap = max(self._heap, self._small)
        self._grown()

    def _drop(self, key: int) -> tuple[_Origin, int]:
        origin, size = self._entries.pop(key)
        self._live[origin] -= size
        if not self._live[origin]:
            del self._live[origin]
        self.now -= size
        if size < self._large:
            self._small -= size
        return origin, size

    def _grown(self) -> None:
        held = self.now + self._heap - self._small
        if held > self._phase.held:
            self._phase.held, self._rising = held, True

    def _note(self) -> None:
        """Remember who holds what at a peak: before anything is freed, not at each tensor on the way up."""
        if self._rising:
            self._phase.live, self._phase.epoch, self._rising = dict(self._live), self._epoch, False


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among the arguments or results of an operation, and in lists among them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (part for part in x if isinstance(part, Tensor))


class TracedLedger(Ledger):
    """Books what is sent with the module that sends it, and tells when it arrives: a world that is not there has
    everything at once."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def sent(self, op: str, n_bytes: int, messages: int = 1) -> None:
        super().sent(op, n_bytes, messages)
        self._tracer.send(op, n_bytes, messages)

    def arrival(self) -> float:
        return self._tracer.arrival()

    @contextmanager
    def waiting(self, op: str, device: torch.device, arrival: float = 0.0) -> Iterator[None]:
        self._tracer.wait(arrival)
        with super().waiting(op, device, arrival):
            yield
