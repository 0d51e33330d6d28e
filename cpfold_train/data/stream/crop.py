"""Choose the tokens of a crop. Pure functions of a generator; the tokens keep their order.

A crop has at most ``max_tokens`` tokens and ``max_atoms`` atoms, and a complex within both limits is taken whole. The
tokens of a ligand's residue come together or not at all, as in Boltz-2. A crop shows a resolved residue of each chain
that was drawn, and is refused only if no resolved residue of the complex fits. Nothing here is quadratic in the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError

CROPS = ("spatial", "interface", "contiguous", "neighbourhood")

INTERFACE_DISTANCE = 15.0
"""Angstrom between center atoms below which a token is at an interface (AlphaFold 3, supplement 2.7)."""

NEIGHBOURHOODS = np.arange(0, 41, 2)
"""Sizes of the stretches that a neighbourhood crop is made of, one drawn for each crop (Boltz-1, algorithm 3)."""

Focus = tuple[int, ...]
"""What a crop is to show: a chain (i,), an interface of two chains (i, j), or () for whatever the crop draws."""


SPATIAL: Mapping[str, float] = {"spatial": 1.0}


def crop_tokens(
    structure: Structure,
    rng: np.random.Generator,
    *,
    max_tokens: int,
    max_atoms: int | None = None,
    kinds: Mapping[str, float] = SPATIAL,
    focus: Focus = (),
) -> np.ndarray:
    """Draw a crop.

    ``contiguous`` takes a stretch of each chain. The others start at a resolved token of the focus: ``spatial`` takes
    the nearest tokens, ``interface`` the same around a token near another chain, ``neighbourhood`` the nearest tokens
    with their neighbours in sequence. The last two draw an interface where there is no focus, ``interface`` also one of
    a chain.

    Args:
        max_tokens: most tokens.
        max_atoms: most atoms, None for no limit.
        kinds: relative probability of each kind of ``CROPS``.
        focus: what to show. Of two chains without residues that fit together one is shown.

    Returns:
        (n,) int64, ascending.

    Raises:
        DataError: no resolved residue fits.
    """
    kind = rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values()))
    atoms = len(structure.resolved)
    max_atoms = atoms if max_atoms is None else max_atoms
    if len(structure) <= max_tokens and atoms <= max_atoms:
        return np.arange(len(structure))
    if kind == "contiguous":
        return contiguous_crop(structure, max_tokens, max_atoms, rng, focus)
    drawn = focus
    if kind == "interface" or (kind == "neighbourhood" and not focus):
        focus = focus if len(focus) == 2 else draw_focus(structure, rng, focus)
        drawn = drawn or focus
    # A small crop is made of small pieces.
    size = int(min(rng.choice(NEIGHBOURHOODS), max_tokens // 2)) if kind == "neighbourhood" else 0
    seeds = draw_seeds(structure, rng, focus, drawn, max_tokens, max_atoms)
    return neighbourhood_crop(structure, seeds, size, max_tokens, max_atoms)


def _resolved_residues(structure: Structure, max_tokens: int, max_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """(L,) bool: tokens that are located and whose residue fits into a crop; (L, 2) tokens and atoms of the residue.

    A token without its center atom counts only in chains that have no center atom at all, as traces of phosphates. Of a
    structure without any resolved atom, as one to be predicted, all tokens count.

    Raises:
        DataError: there is none.
    """
    start, stop = _windows(structure, 0)
    sizes = np.stack([stop - start, structure.atom_start[stop] - structure.atom_start[start]], axis=1)
    known = structure.center[1]
    located = np.where(np.isin(structure.asym_id, structure.asym_id[known]), known, _positions(structure)[1])
    located |= not structure.resolved.any()
    allowed = located & (sizes <= (max_tokens, max_atoms)).all(axis=1)
    if not allowed.any():
        raise DataError(f"no resolved residue fits in a crop of {max_tokens} tokens and {max_atoms} atoms")
    return allowed, sizes


def _positions(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """(L, 3) position of each token's center atom or else of its first resolved one, and (L,) bool if it has any."""
    center, known = structure.center
    atoms = np.flatnonzero(structure.resolved)
    token, first = np.unique(structure.atom_token[atoms], return_index=True)
    position, located = np.zeros_like(center), np.zeros_like(known)
    position[token], located[token] = structure.coords[atoms[first]], True
    position[known] = center[known]
    return position, located


def draw_focus(structure: Structure, rng: np.random.Generator, focus: Focus = ()) -> Focus:
    """One of the interfaces, if a chain is given one of its own; without any that chain, or any resolved one."""
    interfaces = [tuple(pair) for pair in structure.meta["interfaces"] if not focus or focus[0] in pair]
    if interfaces:
        return interfaces[rng.integers(len(interfaces))]
    return focus or (int(rng.choice(np.unique(structure.asym_id[structure.atom_token[structure.resolved]]))),)


def draw_seeds(
    structure: Structure, rng: np.random.Generator, focus: Focus, drawn: Focus, max_tokens: int, max_atoms: int
) -> list[int]:
    """The token at which a crop starts and, of an interface, the nearest token of the other chain that fits beside it.

    Args:
        focus: a chain or an interface.
        drawn: the chains of the focus in which the crop may start.

    Raises:
        DataError: no resolved residue fits.
    """
    allowed, sizes = _resolved_residues(structure, max_tokens, max_atoms)
    asym_id, limits = structure.asym_id, (max_tokens, max_atoms)
    in_drawn = allowed & np.isin(asym_id, drawn) if drawn else allowed
    # For each token, those of the other chain of the focus.
    other = {chain: allowed & (asym_id == partner) for chain, partner in zip(focus, focus[::-1]) if len(focus) == 2}
    paired = np.zeros_like(allowed)
    for chain in [chain for chain in other if other[chain].any()]:
        here = in_drawn & (asym_id == chain)
        paired[here] = (sizes[here] + sizes[other[chain]].min(axis=0) <= limits).all(axis=1)
    seed = draw_seed(structure, rng, focus, next(some for some in (paired, in_drawn, allowed) if some.any()))
    if not paired[seed]:
        return [seed]
    beside = np.flatnonzero(other[int(asym_id[seed])] & (sizes + sizes[seed] <= limits).all(axis=1))
    position = _positions(structure)[0]
    return [seed, int(beside[_distance2(position[beside], position[seed]).argmin()])]


def draw_seed(structure: Structure, rng: np.random.Generator, focus: Focus, allowed: np.ndarray) -> int:
    """A token of the focus; of an interface, one within ``INTERFACE_DISTANCE`` of the other chain.

    Chains that lie a little further apart are given another 5 Angstrom. Where the focus has no such token, any token
    of its chains serves, and without one any token at all.

    Args:
        allowed: (L,) bool, tokens that may be drawn; at least one, all of them located.
    """
    position, located = _positions(structure)
    candidates = np.flatnonzero(allowed & np.isin(structure.asym_id, focus))
    if not len(candidates):
        return int(rng.permutation(np.flatnonzero(allowed))[0])
    order = rng.permutation(candidates)
    if len(focus) == 2:
        first, second = (position[located & (structure.asym_id == chain)] for chain in focus)
        for distance in (INTERFACE_DISTANCE, INTERFACE_DISTANCE + 5):
            for token in order[_in_box(position[order], first, distance) & _in_box(position[order], second, distance)]:
                others = second if structure.asym_id[token] == focus[0] else first
                if (_distance2(others, position[token]) < distance**2).any():
                    return int(token)
    return int(order[0])


def _in_box(points: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """(n,) bool: which points (n, 3) are no further than ``distance`` from the bounding box of the others (m, 3)."""
    if not len(others):
        return np.zeros(len(points), dtype=bool)
    return ((points >= others.min(0) - distance) & (points <= others.max(0) + distance)).all(axis=1)


def _distance2(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((points - point) ** 2).sum(axis=-1)


def neighbourhood_crop(
    structure: Structure, seeds: Sequence[int], size: int, max_tokens: int, max_atoms: int
) -> np.ndarray:
    """Walk the seeds, then the resolved tokens by distance from the first seed, each with its neighbours in sequence.

    A token brings its whole chain if that has at most ``size`` tokens, else the residues at most d away in sequence,
    with the smallest d that gives ``size`` tokens. The walk ends before the first step that would break a limit. With
    ``size`` 0 this is AlphaFold 3's spatial crop, whole residues at a time (Boltz-1, algorithm 3). ``size`` is halved
    until what the seeds bring fits.

    A second seed, the nearest token of its chain, changes nothing in a crop that would have come to it.
    """
    center, known = structure.center
    known = known.copy()
    known[list(seeds)] = False
    resolved = np.flatnonzero(known)
    distance = _distance2(center[resolved], _positions(structure)[0][seeds[0]])
    order = np.concatenate([np.array(seeds), resolved[np.argsort(distance, kind="stable")]])
    start, stop = _windows(structure, size)
    while size and not _fit(structure, start[list(seeds)], stop[list(seeds)], max_tokens, max_atoms):
        size //= 2
        start, stop = _windows(structure, size)
    # Each token comes at the first step whose window holds it.
    length = (stop - start)[order]
    step = np.repeat(np.arange(len(order)), length)
    brought = np.arange(len(step)) + np.repeat(start[order] - np.cumsum(length) + length, length)
    # The step at which each token comes, ``len(order)`` for never; the crop is all that came before the first step
    # that breaks a limit, so sums by step are enough.
    came = np.full(len(structure), len(order))
    np.minimum.at(came, brought, step)
    atoms = np.bincount(came, np.diff(structure.atom_start), minlength=len(order))[: len(order)]
    tokens = np.bincount(came, minlength=len(order))[: len(order)]
    too_many = (np.cumsum(tokens) > max_tokens) | (np.cumsum(atoms) > max_atoms)
    steps = int(too_many.argmax()) if too_many.any() else len(order)
    return np.flatnonzero(came < steps)


def _fit(structure: Structure, start: np.ndarray, stop: np.ndarray, max_tokens: int, max_atoms: int) -> bool:
    """Whether stretches without common tokens are within the limits together."""
    atoms = structure.atom_start[stop] - structure.atom_start[start]
    return int((stop - start).sum()) <= max_tokens and int(atoms.sum()) <= max_atoms


def _windows(structure: Structure, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(L,) first token and (L,) end of the stretch that each token brings along."""
    asym_id, res_index = structure.asym_id.astype(np.int64), structure.res_index.astype(np.int64)
    # Chain and residue as one ascending number, with room between chains for the widest stretch.
    room = int(res_index.max()) + 2 * size + 2
    residue = asym_id * room + res_index
    # All tokens widen their stretch by one residue on either side, as long as it has fewer than ``size`` tokens.
    distance = np.zeros(len(residue), dtype=np.int64)
    chain_start, chain_stop = np.searchsorted(asym_id, asym_id), np.searchsorted(asym_id, asym_id, side="right")
    whole = chain_stop - chain_start <= size
    for _ in range(size):
        start, stop = _stretch(residue, distance)
        distance += (stop - start < size) & ~whole
    start, stop = _stretch(residue, distance)
    return np.where(whole, chain_start, start), np.where(whole, chain_stop, stop)


def _stretch(residue: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.searchsorted(residue, residue - distance), np.searchsorted(residue, residue + distance, side="right")


def contiguous_crop(
    structure: Structure, max_tokens: int, max_atoms: int, rng: np.random.Generator, focus: Focus = ()
) -> np.ndarray:
    """One stretch of random length from each chain, chains in random order (AlphaFold-Multimer, algorithm 1).

    The chains of the focus, or else the first chain that has a resolved residue, come first and leave room for each
    other; a stretch of these is drawn among those that hold a resolved residue. A stretch ends at residues: it is
    widened to them where there is room.

    Raises:
        DataError: no resolved residue fits.
    """
    allowed, sizes = _resolved_residues(structure, max_tokens, max_atoms)
    asym_id = structure.asym_id
    residue_start, residue_stop = _windows(structure, 0)
    seen = np.concatenate([[0], np.cumsum(allowed)])
    order = rng.permutation(np.unique(asym_id)).tolist()
    # The least tokens and atoms of each chain that can be shown.
    least_of = {chain: sizes[here].min(axis=0) for chain in order if (here := allowed & (asym_id == chain)).any()}
    shown = [chain for chain in least_of if chain in focus] or list(least_of)[:1]
    if (sum(least_of[chain] for chain in shown) > (max_tokens, max_atoms)).any():
        shown = shown[:1]
    room, left = np.array([max_tokens, max_atoms]), len(structure)
    reserved = sum(least_of[chain] for chain in shown)
    pieces = []
    for chain in sorted(order, key=lambda chain: chain not in shown):
        first, end = np.searchsorted(asym_id, [chain, chain + 1])
        left -= end - first
        reserved = reserved - least_of[chain] if chain in shown else reserved
        tokens, atoms = room - reserved
        most = min(tokens, end - first)
        least = min(most, max(int(chain in shown), room[0] - left))
        length = int(rng.integers(least, most + 1))
        if not length:
            continue
        start = residue_start[first:end]
        stop = residue_stop[np.minimum(np.arange(first, end) + length, end) - 1]
        last = np.searchsorted(structure.atom_start, structure.atom_start[start] + atoms, side="right") - 1
        last = np.minimum(last, start + tokens)
        stop = np.where(stop > last, residue_start[np.minimum(last, len(structure) - 1)], stop)
        # Stretches of the whole length, unless only a shorter one at the chain's end is resolved.
        possible = np.flatnonzero(seen[stop] > seen[start]) if chain in shown else np.arange(end - first)
        whole = possible[possible <= end - first - length]
        chosen = rng.choice(whole if len(whole) else possible)
        pieces.append(np.arange(start[chosen], stop[chosen]))
        room = room - (len(pieces[-1]), structure.atom_start[stop[chosen]] - structure.atom_start[start[chosen]])
    return np.sort(np.concatenate(pieces))
