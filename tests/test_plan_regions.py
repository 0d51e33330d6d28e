"""``compile=true`` in a plan: the kernels that are counted are those that TorchInductor makes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._inductor import compile_fx, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from cpfold_train.kernels.regions import REGIONS
from cpfold_train.model import transformer
from cpfold_train.simulate.fusion import fused, is_product
from cpfold_train.simulate.regions import regions_compiled
from cpfold_train.simulate.trace import Tracer
from cpfold_train.simulate.work_counter import MEMORY, Speed, WorkCounter, totals
from tests.test_regions import COND, DIM, HEADS, INPUTS, B, N, found

Counts = list[tuple[int, int]]
"""Kernels that are generated, and calls of products: of the forward graph, then of the backward graph."""
QUICK = {"_gated_projection", "_adaptive_norm", "_weighted"}


def arguments(name: str) -> list[Tensor | int]:
    generator = torch.Generator().manual_seed(4)
    shapes = INPUTS[name]
    return [x if isinstance(x, int) else torch.randn(*x, generator=generator).requires_grad_() for x in shapes]


def of_inductor(name: str) -> Counts:
    """As its scheduler has them, just before code is generated."""
    counts: Counts = []

    def count(module: GraphModule, inputs: list[Tensor], **kwargs):
        compile_fx.record_original_output_strides(module)
        fake_mode = compile_fx.fake_tensor_prop(module, inputs)
        inference = kwargs.get("is_inference", False)
        with DebugContext(), V.set_fake_mode(fake_mode):
            compile_fx._recursive_post_grad_passes(module, inference)
            graph = GraphLowering(
                module,
                shape_env=fake_mode.shape_env,
                is_backward=kwargs.get("is_backward", False),
                is_inference=inference,
            )
            with V.set_graph_handler(graph), V.set_real_inputs(inputs):
                graph.run(*inputs)
                nodes = scheduler.Scheduler(graph.operations).nodes
        products = sum(isinstance(x, scheduler.ExternKernelSchedulerNode) for x in nodes)
        unused = sum(isinstance(x, scheduler.NopKernelSchedulerNode) for x in nodes)
        counts.append((len(nodes) - products - unused, products))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = partial(compile_fx.compile_fx, inner_compile=count)
    found(torch.compile(REGIONS[name], backend=backend, fullgraph=True), arguments(name))
    return counts


def of_the_rule(name: str) -> Counts:
    counts: Counts = []

    def count(module: GraphModule, _: list[Tensor]):
        kernels = set(fused(module.graph).values())
        counts.append((len(kernels), sum(map(is_product, module.graph.nodes))))
        return make_boxed_func(module.forward)

    traced = aot_function(REGIONS[name], count, count, min_cut_rematerialization_partition, select_decomp_table())
    found(lambda *args: tuple(x) if isinstance(x := traced(*args), list) else x, arguments(name))
    return counts


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in INPUTS])
def test_kernels_of_a_region_are_those_of_inductor(name):
    """On CPU Inductor makes up to two kernels more of a graph: it keeps sigmoids and exponentials that are read twice,
    copies what is put together part by part, and has one kernel for the maximum and one for the sum of a softmax."""
    inductor, rule = of_inductor(name), of_the_rule(name)
    assert [x[1] for x in inductor] == [x[1] for x in rule]
    for (theirs, _), (ours, _) in zip(inductor, rule, strict=True):
        assert 0 <= theirs - ours <= 2


def layer_counter(compiled: bool) -> tuple[WorkCounter, list[torch.Size], int]:
    """Of a layer of the diffusion transformer under recomputation, forward and backward; gradients; what is left."""
    tracer = Tracer(Speed(lambda kernel: (MEMORY, 1.0), lambda *_: 0.0), 0)
    with FakeTensorMode(), tracer:
        module = transformer.DiffusionTransformer(2, HEADS, DIM, COND)
        a, s = torch.empty(B, N, DIM).requires_grad_(), torch.empty(B, N, COND)

        def step() -> None:
            out = module(a, s, lambda i: s, lambda q, k, v, b: (q + k) * v, checkpoint=True)
            out.sum().backward()

        if compiled:
            with regions_compiled(tracer):
                step()
        else:
            step()
        gradients = [x.grad.shape for x in (a, *module.parameters())]
        return totals(tracer.counters), gradients, tracer.now


def test_a_compiled_layer_makes_the_same_products_in_fewer_launches():
    (plain, shapes, held), (compiled, compiled_shapes, compiled_held) = layer_counter(False), layer_counter(True)
    assert compiled.flops == plain.flops
    assert compiled.kernels < 0.85 * plain.kernels
    assert compiled.moved_bytes < plain.moved_bytes
    assert compiled_shapes == shapes
    # Graphs keep nothing of what they were traced with.
    assert compiled_held == held


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """A norm and a product, then a softmax."""
    return (nn.functional.layer_norm(x, x.shape[-1:]) @ weight).relu().softmax(-1)


def test_a_kernel_reads_what_others_made_and_writes_what_others_read():
    graphs = []

    def keep(module: GraphModule, _: list[Tensor]):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(6, 8), torch.empty(8, 10)
        aot_function(chain, keep, keep, decompositions=select_decomp_table())(x, weight)
    norm, softmax = dict.fromkeys(fused(graphs[0]).values())
    assert norm.counted().moved_bytes == 4 * (6 * 8 + 6 * 8)
    assert softmax.counted().moved_bytes == 4 * (6 * 10 + 6 * 10)
    assert softmax.counted().exps == 6 * 10
