"""The kernels that TorchInductor would make of a graph, without making any.

Matrix products, attention and this project's own operators are launches of their own. The rest follows three rules,
which are Inductor's main ones (``torch/_inductor/ir.py`` and ``scheduler.py``):

1. A pointwise operation that only such operations and reductions read is computed where it is read, as often as it is.
2. What remains are loops: reductions, and pointwise results that a product or the caller of the graph reads.
3. A loop joins a kernel whose results it reads, or that reads what it reads, if their sizes agree: two over equally
   many elements, or a reduction and one over what it returns or, for one of the last dims, over what it reads. No
   other kernel may have to run between the two.

A kernel reads what others have made, once, and writes what others need. A test compares this with Inductor itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cpfold_train.simulate.trace import WITH_EXPONENTIALS
from cpfold_train.simulate.work_counter import Kernel

FILLS_A_GPU = 1 << 13
"""Results from which on a reduction of leading dims, as that of a bias's gradient, is not split into two launches: 32
for each of two warps of 132 multiprocessors (``num_splits`` in ``torch/_inductor/ir.py``)."""
_REDUCTIONS = {"sum", "mean", "var_mean", "var", "amax", "amin", "argmax", "argmin", "prod", "any", "all"}
_ADDING = {"index_put", "index_put_"}
"""Loops over their third argument that add to their first."""


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel.

    Attributes:
        root: the operation whose result it makes.
        nodes: that one and those that are computed on the way.
        reads: what others have made, and by which views it is read.
        results, each: numbers of results and of elements that each of them is reduced from; 1 if it is pointwise.
        last: whether a reduction is one of the last dims.
    """

    root: Node
    nodes: set[Node]
    reads: dict[Node, set[Node]]
    results: int
    each: int
    last: bool

    @property
    def views(self) -> set[Node]:
        """As which it reads what others have made."""
        return set().union(*self.reads.values())


@dataclass(eq=False)
class Fused:
    """A kernel.

    Attributes:
        loops: in order.
        writes: those of their results that others read.
    """

    loops: list[Loop] = field(default_factory=list)
    writes: list[Node] = field(default_factory=list)

    @property
    def roots(self) -> list[Node]:
        """What they make, wherever it is read."""
        return [loop.root for loop in self.loops]

    @property
    def reads(self) -> dict[Node, set[Node]]:
        """What others have made, and by which views it is read."""
        found: dict[Node, set[Node]] = {}
        for loop in self.loops:
            for source, views in loop.reads.items():
                if source not in self.roots:
                    found.setdefault(source, set()).update(views)
        return found

    @property
    def views(self) -> set[Node]:
        """As which they are read."""
        return set().union(*self.reads.values())

    def agrees(self, loop: Loop) -> bool:
        """Whether the sizes of a loop are those of the ones that are there."""
        loops = [*self.loops, loop]
        if any(name(x.root) in _ADDING for x in loops):
            return False
        sizes = {(x.results, x.each, x.last) for x in loops if x.each > 1}
        pointwise = {x.results for x in loops if x.each == 1}
        if not sizes:
            return len(pointwise) == 1
        (results, each, last), *others = sizes
        return not others and pointwise <= {results, results * each if last else results}

    def counted(self) -> Kernel:
        """What it counts as."""
        moved = sum(x.nbytes for node in self.writes for x in tensors(node))
        for source, views in self.reads.items():
            moved += min(sum(x.nbytes for x in tensors(source)), sum(x.nbytes for v in views for x in tensors(v)))
        nodes = set.union(*(loop.nodes for loop in self.loops))
        exps = sum(x.numel() for node in nodes if name(node) in WITH_EXPONENTIALS for x in tensors(node))
        split = any(loop.each > 1 and not loop.last and loop.results < FILLS_A_GPU for loop in self.loops)
        return Kernel(0, tensors(self.roots[0])[0].dtype, moved, exps, launches=1 + split)


def fused(graph: Graph) -> dict[Node, Fused]:
    """The kernels of a graph of ATen operations with ``meta["val"]``, by the operations whose results they make."""
    roots = [node for node in graph.nodes if _is_fusible(node) and _is_root(node)]
    kernels: dict[Node, Fused] = {}
    for loop in (_loop(root, set(roots)) for root in roots):
        found = dict.fromkeys(kernels[x] for x in loop.reads if x in kernels)
        found |= dict.fromkeys(x for x in kernels.values() if x.views & loop.views)
        joined = next((x for x in found if x.agrees(loop) and not _comes_between(x, loop, kernels)), None) or Fused()
        joined.loops.append(loop)
        kernels[loop.root] = joined
    read = {node for kernel in kernels.values() for node in kernel.reads}
    for root, kernel in kernels.items():
        if root in read or _is_left(root):
            kernel.writes.append(root)
    return kernels


def name(node: Node) -> str:
    """Of the operation, without namespace and overload; of what is none, its kind."""
    return node.target._schema.name.rpartition("::")[2] if hasattr(node.target, "_schema") else node.op


def is_view(node: Node) -> bool:
    """Whether it is another view of what it reads, or one of several results."""
    if node.op != "call_function":
        return False
    return not hasattr(node.target, "_schema") or node.target.is_view or name(node) in ("_unsafe_view", "split")


def source(node: Node) -> Node:
    """What was made of which this is a view."""
    while is_view(node):
        node = node.args[0]
    return node


def tensors(node: Node) -> list[Tensor]:
    """The results of a node."""
    return [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]


def is_product(node: Node) -> bool:
    """Whether it is launched by itself: a product, attention, or an operator of this project."""
    if node.op != "call_function" or is_view(node):
        return False
    return node.target.namespace not in ("aten", "prims") or node.target._overloadpacket in flop_registry


def _is_fusible(node: Node) -> bool:
    return node.op == "call_function" and not is_view(node) and not is_product(node)


def _is_root(node: Node) -> bool:
    added_to = any(name(x) in _ADDING and source(x.args[0]) is node for x in _readers(node))
    return name(node) in _REDUCTIONS | _ADDING or added_to or _is_left(node)


def _is_left(node: Node) -> bool:
    """Whether what is no loop reads it."""
    return not all(map(_is_fusible, _readers(node)))


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if is_view(user):
            yield from _readers(user)
        else:
            yield user


def _loop(root: Node, roots: set[Node]) -> Loop:
    nodes, reads, todo = {root}, {}, [root]
    while todo:
        for read in todo.pop().all_input_nodes:
            made = source(read)
            if _is_fusible(made) and made not in roots:
                if made not in nodes:
                    nodes.add(made)
                    todo.append(made)
            else:
                reads.setdefault(made, set()).add(read)
    results, last = tensors(root)[0].numel(), True
    if name(root) in _ADDING:
        return Loop(root, nodes, reads, tensors(root.args[2])[0].numel(), 1, last)
    if name(root) not in _REDUCTIONS:
        return Loop(root, nodes, reads, results, 1, last)
    before = tensors(root.args[0])[0]
    dims = root.args[1] if len(root.args) > 1 and root.args[1] not in (None, []) else range(before.ndim)
    dims = sorted(dim % before.ndim for dim in ([dims] if isinstance(dims, int) else dims))
    last = dims == list(range(before.ndim))[-len(dims) :]
    return Loop(root, nodes, reads, results, prod(before.shape[dim] for dim in dims), last)


def _comes_between(kernel: Fused, loop: Loop, kernels: dict[Node, Fused]) -> bool:
    """Whether a loop needs something that can only run after a kernel, beside the results of that kernel."""
    todo, seen = [x for x in loop.reads if kernels.get(x) is not kernel], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if kernels.get(node) is kernel:
            return True
        todo += kernels[node].reads if node in kernels else map(source, node.all_input_nodes)
    return False
