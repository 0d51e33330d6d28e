"""Orders of a molecule's atoms that a structure cannot tell apart: the symmetries of its bond graph.

Terminal atoms of one element on one atom are alike whatever the order of their bonds, as the oxygens of a carboxylate
or a phosphate are. A symmetry must not turn a stereocentre inside out: the reference conformer tells.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice, permutations

import networkx as nx
import numpy as np

MOST = 24
"""How many symmetries of a molecule are kept, those that move the fewest atoms first."""
_SEARCHED = 200
_CARBON = 6
_FLAT = 0.2
"""Triple product of three unit vectors below which a carbon is planar; of a tetrahedral one it is 0.77."""


@lru_cache(maxsize=4096)
def automorphisms(
    elements: tuple[int, ...], bonds: tuple[tuple[int, int, int], ...], linked: tuple[bool, ...], pos: bytes
) -> np.ndarray:
    """Permutations of n atoms, identity excluded, that leave elements, bonds and handedness as they are.

    Args:
        elements: (n,) atomic numbers.
        bonds: two atoms and the type of each bond.
        linked: (n,) which atoms are bonded to other residues; these stay what they are.
        pos: (n, 3) float32 reference conformer, as bytes.

    Returns:
        (k, n) int64, k <= ``MOST``; atom i takes the position of atom ``[., i]``. Terminal atoms of one centre are
        permuted by themselves, and the rest with each of these in one order: the products are symmetries as well.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(elements)))
    graph.add_weighted_edges_from(bonds, weight="type")
    points = np.frombuffer(pos, dtype=np.float32).reshape(-1, 3).astype(np.float64)
    hand = {c: _handedness(points, c, list(graph[c])) for c in graph if elements[c] == _CARBON}

    leaves: dict[int, list[list[int]]] = {}
    for centre in graph:
        own = [i for i in graph[centre] if len(graph[i]) == 1 and not linked[i] and len(graph[centre]) > 1]
        groups = [[i for i in own if elements[i] == e] for e in sorted({elements[i] for i in own})]
        leaves[centre] = [group for group in groups if group]

    found = {}
    identity = np.arange(len(elements))
    for centre, groups in leaves.items():
        for group in groups:
            for order in islice(permutations(group), 1, None):
                moved = identity.copy()
                moved[group] = order
                if _keeps(moved, centre, graph, hand, points):
                    found[moved.tobytes()] = moved
    core = graph.subgraph(set(graph) - {i for groups in leaves.values() for group in groups for i in group}).copy()
    for i in core:
        core.nodes[i]["kind"] = elements[i], linked[i] and i, tuple((elements[g[0]], len(g)) for g in leaves[i])
    matcher = nx.algorithms.isomorphism.GraphMatcher(
        core, core, lambda a, b: a["kind"] == b["kind"], lambda a, b: a["type"] == b["type"]
    )
    for mapping in islice(matcher.isomorphisms_iter(), _SEARCHED):
        moved = _with_leaves(mapping, leaves, graph, hand, points)
        if moved is not None and (moved != identity).any():
            found.setdefault(moved.tobytes(), moved)
    ranked = sorted(found.values(), key=lambda moved: (int((moved != identity).sum()), moved.tolist()))
    return np.array(ranked[:MOST], dtype=np.int64).reshape(-1, len(elements))


def _with_leaves(mapping: dict[int, int], leaves, graph, hand, points) -> np.ndarray | None:
    """A symmetry of the core as one of all atoms; None if it turns a stereocentre inside out."""
    moved = np.arange(len(graph))
    for i, image in mapping.items():
        moved[i] = image
    for i, image in mapping.items():
        for group, other in zip(leaves[i], leaves[image]):
            for order in permutations(other):
                moved[group] = order
                if _keeps(moved, i, graph, hand, points):
                    break
    return moved if all(_keeps(moved, i, graph, hand, points) for i in mapping) else None


def _keeps(moved: np.ndarray, centre: int, graph, hand, points) -> bool:
    """Whether the neighbours' images lie around the centre's image as they do around it."""
    if not hand.get(centre):
        return True
    image = [int(moved[i]) for i in graph[centre]]
    return _handedness(points, int(moved[centre]), image) == hand[centre]


def _handedness(points: np.ndarray, centre: int, neighbours: list[int]) -> int:
    """1 or -1 by the sense of the first three neighbours, 0 where there are fewer or they lie in a plane."""
    if len(neighbours) < 3:
        return 0
    arms = points[neighbours[:3]] - points[centre]
    volume = np.linalg.det(arms / (np.linalg.norm(arms, axis=1, keepdims=True) + 1e-6))
    return 0 if abs(volume) < _FLAT else int(np.sign(volume))
