"""One rank of a world that is not there: memory and bytes of an op on any grid, on one core and without its memory.

The op's own code runs under ``FakeTensorMode``, so tensors have shapes but no contents, and with torch's fake process
group, so messages are counted but not sent. Live memory is the sum of the storages that tensors hold.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cpfold_train.kernels import blockwise_attention
from cpfold_train.kernels.by_rows import BLOCK_BYTES
from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.cases import CASES
from cpfold_train.simulate.bench.inputs import allocate_gradients, make_features, make_inputs, precision
from cpfold_train.simulate.contents import found_in


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are still referenced, and their peak.

    Attributes:
        now: live bytes.
        peak: the most there were since the start or the last :meth:`reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Start a new peak."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            with self:
                return found_in(args[0])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


def simulate(
    op: str,
    config: ModelConfig,
    sizes: Sizes,
    grid: Grid,
    dtype: torch.dtype,
    algorithm: str,
    kernels: str = "torch",
) -> dict:
    """Forward and backward of one op as the rank that ``grid`` names.

    Returns:
        ``peak_bytes`` above inputs, weights and their gradients, ``sent_bytes``, and ``ops``, the ledger's entries by
        operation.
    """
    case, device = CASES[op], torch.device("cpu")
    # Every call is made in Python, block for block, and a real core's cache does not matter here.
    blockwise_attention.SCORE_BYTES = BLOCK_BYTES
    with torch.device("meta"):
        weights, mixed = precision(dtype, device)
        module = case.build(config).to(weights)
    # Some of the features decide what travels, so they have values.
    features = make_features(case.inputs, sizes, grid, device)
    with fake_world(grid, algorithm, kernels) as cp, FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        module = module.to_empty(device="cpu")
        allocate_gradients(module)
        x = features | make_inputs(case.inputs, config, sizes, grid, dtype, device)
        with mixed:
            outputs = case.call(module, x, cp)
        grads = [torch.empty_like(out) for out in outputs]
        del outputs
        cp.ledger.reset()
        memory.reset()
        before = memory.now
        with mixed:
            outputs = case.call(module, x, cp)
        torch.autograd.backward(outputs, grads)
        total = cp.ledger.total()
        ops = {name: asdict(entry) for name, entry in cp.ledger.by_op().items()}
    return {"peak_bytes": memory.peak - before, "sent_bytes": total.sent_bytes, "ops": ops}
