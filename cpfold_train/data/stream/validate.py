"""What must hold in a sample before anything is computed from it.

Damage that decompression does not notice, or that a faulty writer leaves, must not reach an index or a loss. Every
check looks at the whole sample, so all ranks that share it come to the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.features.templates import Template
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import BOND_TYPES, MOL_TYPES, NONPOLYMER, NUM_ELEMENTS, NUM_TOKENS

MAX_COORDINATE = 1e5
"""Angstrom; beyond it, a flipped bit is likelier than a molecule, and squares would lose their digits in fp32."""

LAYOUT = {
    "res_type": (np.int8, "L"),
    "component": (np.int16, "L"),
    "res_index": (np.int32, "L"),
    "asym_id": (np.int16, "L"),
    "modified": (np.bool_, "L"),
    "atom_start": (np.int32, "L+1"),
    "center_atom": (np.int16, "L"),
    "disto_atom": (np.int16, "L"),
    "ref_atom": (np.int32, "M"),
    "resolved": (np.bool_, "M"),
    "coords": (np.float32, "M3"),
    "b_factor": (np.float32, "M"),
    "bond_atoms": (np.int32, "K2"),
    "bond_type": (np.uint8, "K"),
    "comp_name": (np.dtype("S5"), "C"),
    "comp_start": (np.int32, "C+1"),
    "comp_atom_name": (np.dtype("S4"), "Q"),
    "comp_element": (np.uint8, "Q"),
    "comp_charge": (np.int8, "Q"),
    "comp_pos": (np.float32, "Q3"),
}
"""Type of each array and its shape, in the letters of :class:`Structure`."""

TEMPLATE_LAYOUT = {
    "token": (np.int32, ()),
    "res_type": (np.int8, ()),
    "backbone": (np.float32, (3, 3)),
    "frame_known": (np.bool_, ()),
    "center": (np.float32, (3,)),
    "disto_center": (np.float32, (3,)),
    "disto_known": (np.bool_, ()),
}
"""Type of each array of a template over its P tokens, and the dims after the first."""


def check_sample(structure: Structure, alignments: dict[int, Alignment], templates: list[Template], key: str) -> None:
    """Check a decoded sample.

    Args:
        key: the id under which it was found.

    Raises:
        DataError: what is wrong, without naming the sample.
        TypeError, KeyError and others: ``meta`` is not of the shape that the format describes.
    """
    for checks in (_shapes(structure), _meta(structure, key), _tokens(structure), _atoms(structure)):
        _first_failure(checks)
    _first_failure(_alignments(structure, alignments))
    _first_failure(_templates(structure, templates))


def _first_failure(checks: Iterator[tuple[bool, str]]) -> None:
    for holds, failure in checks:
        if not holds:
            raise DataError(failure)


def _shapes(s: Structure) -> Iterator[tuple[bool, str]]:
    sizes = {"L": len(s.res_type), "M": len(s.resolved), "K": len(s.bond_type)}
    sizes |= {"C": len(s.comp_name), "Q": len(s.comp_element)}
    for name, (dtype, shape) in LAYOUT.items():
        value = getattr(s, name)
        yield value.dtype == dtype, f"{name} is {value.dtype} instead of {np.dtype(dtype)}"
        first = sizes[shape[0]] + shape.endswith("+1")
        expected = (first, int(shape[1])) if shape[1:].isdigit() else (first,)
        yield value.shape == expected, f"{name} has shape {value.shape} instead of {expected}"
    yield sizes["L"] > 0, "it has no token"


def _meta(s: Structure, key: str) -> Iterator[tuple[bool, str]]:
    meta: dict[str, Any] = s.meta
    chains = meta["chains"]
    yield meta["id"] == key, f"it is {meta['id']} by its own account"
    yield meta["method"] is None or isinstance(meta["method"], str), "its method is not text"
    for chain in chains:
        yield chain["type"] in MOL_TYPES, f"a chain is of type {chain['type']}"
        numbers = [chain[name] for name in ("entity", "sym", "length")]
        yield all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers), "a chain has a wrong number"
    for pair in meta["interfaces"]:
        first, second = pair
        yield 0 <= first < second < len(chains), f"it has an interface between chains {first} and {second}"


def _tokens(s: Structure) -> Iterator[tuple[bool, str]]:
    chains = s.meta["chains"]
    yield _within(s.res_type, 0, NUM_TOKENS), "a residue token is out of range"
    yield _within(s.component, 0, len(s.comp_name)), "a token's component is out of range"
    yield _within(s.asym_id, 0, len(chains)), "a token's chain is out of range"
    yield bool((np.diff(s.asym_id) >= 0).all()), "the chains are not in order"
    ascending = (np.diff(s.res_index) >= 0) | (np.diff(s.asym_id) > 0)
    yield bool(ascending.all()), "the residues of a chain are not in order"
    length = np.array([chain["length"] for chain in chains], dtype=np.int64)
    yield bool((s.res_index >= 0).all() and (s.res_index < length[s.asym_id]).all()), "a residue is outside its chain"
    polymer = s.chains["mol_type"] != NONPOLYMER
    count = np.bincount(s.asym_id, minlength=len(chains))
    yield bool((count == length)[polymer].all()), "a chain has not as many residues as its sequence"
    in_order = (np.diff(s.res_index) == 1) | (np.diff(s.asym_id) > 0) | ~s.polymer[1:]
    yield bool(in_order.all()), "a chain lacks residues of its sequence"
    first = np.unique(s.asym_id, return_index=True)[1]
    yield bool((s.res_index[first] == 0)[polymer[s.asym_id[first]]].all()), "a chain lacks its first residue"


def _atoms(s: Structure) -> Iterator[tuple[bool, str]]:
    size, ref = np.diff(s.atom_start), np.diff(s.comp_start)
    for name, total in (("atom_start", len(s.resolved)), ("comp_start", len(s.comp_element))):
        start = getattr(s, name)
        yield bool(start[0] == 0 and start[-1] == total), f"{name} does not go from 0 to {total}"
    yield bool((size >= 0).all() and (ref >= 0).all()), "atom_start or comp_start goes down"
    for name, atom in (("center_atom", s.center_atom), ("disto_atom", s.disto_atom)):
        yield bool((atom >= -1).all() and (atom < np.maximum(size, 1)).all()), f"{name} is outside its token"
        yield bool((atom[size == 0] == -1).all()), f"{name} is outside its token"
    component = s.component[s.atom_token]
    owned = (s.ref_atom >= s.comp_start[component]) & (s.ref_atom < s.comp_start[component + 1])
    yield bool(owned.all()), "an atom is not one of its component's"
    for name, values in (("coords", s.coords), ("comp_pos", s.comp_pos)):
        small = bool((np.abs(values) <= MAX_COORDINATE).all())
        yield small, f"{name} holds NaN, infinity or more than {MAX_COORDINATE:.0e} Angstrom"
    yield bool(np.isfinite(s.b_factor).all()), "b_factor holds NaN or infinity"
    yield bool(s.center[1].any()), "no token is resolved"
    yield _within(s.bond_atoms, 0, len(s.resolved)), "a bond's atom is out of range"
    yield bool((s.bond_atoms[:, 0] < s.bond_atoms[:, 1]).all()), "the atoms of a bond are not in order"
    yield _within(s.bond_type, 0, len(BOND_TYPES)), "a bond's type is out of range"
    yield _within(s.comp_element, 0, NUM_ELEMENTS), "an atomic number is out of range"
    letters = s.comp_atom_name.view(np.uint8)
    yield bool(((letters == 0) | ((letters >= 32) & (letters < 96))).all()), "an atom's name has an unknown character"


def _alignments(s: Structure, alignments: dict[int, Alignment]) -> Iterator[tuple[bool, str]]:
    length = {chain["entity"]: chain["length"] for chain in s.meta["chains"] if chain["type"] != MOL_TYPES[NONPOLYMER]}
    for entity, a in alignments.items():
        name = f"the alignment of entity {entity}"
        yield entity in length, f"{name} belongs to no chain"
        for values, dtype in ((a.tokens, np.int8), (a.deletions, np.uint8)):
            shape = (len(a.keys), length[entity])
            yield values.dtype == dtype, f"{name} holds {values.dtype} instead of {np.dtype(dtype)}"
            yield values.shape == shape, f"{name} has shape {values.shape} instead of {shape}"
        yield a.keys.dtype == np.int64 and a.keys.ndim == 1 and len(a.keys) > 0, f"{name} has no proper keys"
        yield _within(a.tokens, 0, NUM_TOKENS), f"a token in {name} is out of range"


def _templates(s: Structure, templates: list[Template]) -> Iterator[tuple[bool, str]]:
    for number, template in enumerate(templates):
        name, count = f"template {number}", template.token.shape[0]
        for field, (dtype, dims) in TEMPLATE_LAYOUT.items():
            value = getattr(template, field)
            yield value.dtype == dtype, f"{field} of {name} is {value.dtype} instead of {np.dtype(dtype)}"
            shape = (count, *dims)
            yield value.shape == shape, f"{field} of {name} has shape {value.shape} instead of {shape}"
            if dtype == np.float32:
                small = bool((np.abs(value) <= MAX_COORDINATE).all())
                yield small, f"{field} of {name} holds NaN, infinity or more than {MAX_COORDINATE:.0e} Angstrom"
        yield count > 0, f"{name} covers no token"
        yield _within(template.token, 0, len(s)), f"a token of {name} is out of range"
        yield bool((np.diff(template.token) > 0).all()), f"the tokens of {name} are not in order"
        yield _within(template.res_type, 0, NUM_TOKENS), f"a residue token of {name} is out of range"


def _within(values: np.ndarray, start: int, stop: int) -> bool:
    return bool(((values >= start) & (values < stop)).all())
