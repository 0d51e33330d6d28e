"""``compile=true`` in a plan: a region runs as the kernels that TorchInductor would make of it.

Its forward and backward graphs are those of AOTAutograd with Inductor's decompositions and partitioner, so that what is
kept for the backward pass, and what is computed again there, is as in a run. Of each graph the kernels of
:mod:`cpfold_train.simulate.fusion` are counted and only their results are held; all else is done as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from cpfold_train.kernels.by_rows import autocast_state
from cpfold_train.kernels.regions import compile_regions
from cpfold_train.simulate.fusion import fused
from cpfold_train.simulate.trace import Tracer
from cpfold_train.simulate.work_counter import Kernel


class _Step(NamedTuple):
    """An operation that is done as it is written, or a kernel and its results, which are made up."""

    nodes: list[Node]
    reads: list[Node]
    kernel: Kernel | None


@contextmanager
def regions_compiled(tracer: Tracer) -> Iterator[None]:
    """Inside, the tracer counts what is compiled of the regions."""
    compile_regions(partial(_compiled, tracer))
    try:
        yield
    finally:
        compile_regions(None)


def _compiled(tracer: Tracer, function: Callable) -> Callable:
    graphs: dict[tuple, Callable] = {}

    def run(*args: Any) -> Any:
        if not isinstance(_tensors(args)[0], FakeTensor):
            # It is being traced, as a part of another.
            return function(*args)
        key = torch.is_grad_enabled(), autocast_state(_tensors(args)[0].device), *map(_kind, args)
        if key not in graphs:
            graphs[key] = _traced(tracer, function, args)
        return graphs[key](*args)

    return run


def _traced(tracer: Tracer, function: Callable, args: Sequence[Any]) -> Callable:
    """The function as graphs for arguments like these."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compiler = partial(_kernels, tracer)
    decompositions = select_decomp_table()
    traced = aot_function(function, compiler, compiler, min_cut_rematerialization_partition, decompositions)
    # It is traced when it is first called, here with stand-ins, which graphs keep. That call counts for nothing, nor
    # does what it keeps for a backward pass.
    with _disable_current_modes(), _tensors(args)[0].fake_mode, saved_tensors_hooks(_same, _same), tracer.times(0):
        traced(*tree_map_only(Tensor, lambda x: _room(x).requires_grad_(x.requires_grad), tuple(args)))
    return traced


def _kernels(tracer: Tracer, module: GraphModule, _: Sequence[Any]) -> Callable:
    steps, inputs = _steps(module.graph), [node for node in module.graph.nodes if node.op == "placeholder"]
    results = module.graph.output_node().args[0]
    last = {node: i for i, step in enumerate(steps) for node in (*step.nodes, *step.reads)}
    last |= dict.fromkeys((x for x in results if isinstance(x, Node)), len(steps))
    unused: list[list[Node]] = [[] for _ in steps]
    for node, i in last.items():
        if i < len(steps):
            unused[i].append(node)

    def run(args: list[Any]) -> list[Any]:
        values = {node: x for node, x in zip(inputs, args) if node in last}
        args.clear()
        for step, done in zip(steps, unused):
            if step.kernel:
                tracer.kernel(step.kernel)
                values |= {node: tree_map_only(Tensor, _room, node.meta["val"]) for node in step.nodes}
            else:
                (node,) = step.nodes
                args, kwargs = tree_map_only(Node, values.__getitem__, (node.args, node.kwargs))
                values[node] = node.target(*args, **kwargs)
                del args, kwargs
            for node in done:
                del values[node]
        return [values[x] if isinstance(x, Node) else x for x in results]

    run._boxed_call = True
    return run


def _steps(graph: Graph) -> list[_Step]:
    """What is done, in an order in which all that is read has been made."""
    kernels = fused(graph)
    done: set[Node] = set()
    steps: list[_Step] = []

    def make(node: Node) -> None:
        if node in done or node.op == "placeholder":
            return
        if node not in kernels:
            for x in node.all_input_nodes:
                make(x)
            done.add(node)
            steps.append(_Step([node], node.all_input_nodes, None))
            return
        kernel = kernels[node]
        for x in kernel.reads:
            make(x)
        done.update(kernel.roots)
        steps.append(_Step(kernel.writes, list(kernel.reads), kernel.counted()))

    for x in graph.output_node().all_input_nodes:
        make(x)
    return steps


def _kind(argument: Any) -> Any:
    """What a graph is made for."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.shape, argument.stride(), argument.dtype, argument.requires_grad


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


def _room(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _same(x: Tensor) -> Tensor:
    return x
