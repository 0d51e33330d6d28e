"""What a YAML file says beside the sequences: bonds, pockets, contacts and templates.

A position is ``[CHAIN, NUMBER]`` of a residue, counted from 1, or ``[CHAIN, ATOM]`` of a ligand's atom.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpfold_train.data.features.conditioning import BINDER_TO_POCKET, CONTACT, CUTOFFS, POCKET_TO_BINDER, Condition
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.features.templates import Template
from cpfold_train.data.structures.components import component
from cpfold_train.data.structures.entry import Chain, Site
from cpfold_train.data.structures.parse import read_structure
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import DNA, NONPOLYMER, PROTEIN, RNA

DEFAULT_DISTANCE = 6.0
"""Angstrom, of pockets and contacts that give none."""

_ENDS = {PROTEIN: ("N", "C"), DNA: ("P", "O3'"), RNA: ("P", "O3'")}
"""Atoms of the first and the last residue that close a ring."""
_FIELDS = {
    "bond": ({"atom1", "atom2"}, set()),
    "pocket": ({"binder", "contacts"}, {"max_distance", "force"}),
    "contact": ({"token1", "token2"}, {"max_distance", "force"}),
}
"""Required and optional fields of each kind of constraint."""


def links_of(constraints: list[Any], chains: list[Chain], closed: list[str]) -> list[tuple[Site, Site]]:
    """Covalent links: the bonds among the constraints, and the ends of the chains ``closed`` to rings."""
    named = {chain.name: chain for chain in chains}
    links = []
    for name in closed:
        chain = named[name]
        if chain.mol_type == NONPOLYMER:
            raise DataError(f"chain {name} is a ligand and cannot be cyclic")
        first, last = _ENDS[chain.mol_type]
        links.append((Site(name, 0, first), Site(name, len(chain.sequence) - 1, last)))
    for constraint in constraints:
        kind, fields = _constraint(constraint)
        if kind == "bond":
            links.append((_site(fields["atom1"], named), _site(fields["atom2"], named)))
    return links


def read_conditions(constraints: list[Any], structure: Structure) -> list[Condition]:
    """The pockets and contacts among the constraints."""
    conditions = []
    for constraint in constraints:
        kind, fields = _constraint(constraint)
        if kind == "bond":
            continue
        if fields.get("force", "false") != "false":
            raise DataError("force is not supported, because no potential guides the sampling: leave it out")
        distance = _distance(fields.get("max_distance"))
        if kind == "pocket":
            binder = np.flatnonzero(structure.asym_id == _chain(fields["binder"], structure))
            pocket = np.concatenate([_tokens(position, structure) for position in fields["contacts"]])
            conditions.append(Condition(binder, pocket, BINDER_TO_POCKET, distance))
            conditions.append(Condition(pocket, binder, POCKET_TO_BINDER, distance))
        else:
            first, second = (_tokens(fields[end], structure) for end in ("token1", "token2"))
            conditions.append(Condition(first, second, CONTACT, distance))
            conditions.append(Condition(second, first, CONTACT, distance))
    return conditions


def _constraint(constraint: Any) -> tuple[str, dict[str, Any]]:
    kind = next(iter(constraint), None) if isinstance(constraint, dict) and len(constraint) == 1 else None
    if kind not in _FIELDS or not isinstance(constraint[kind], dict):
        raise DataError("a constraint is not a bond, a pocket or a contact with its fields")
    required, optional = _FIELDS[kind]
    fields = constraint[kind]
    if not required <= set(fields) <= required | optional:
        raise DataError(f"a {kind} has the fields {', '.join(sorted(required | optional))}")
    return kind, fields


def _distance(text: str | None) -> float:
    if text is None:
        return DEFAULT_DISTANCE
    try:
        distance = float(text)
    except ValueError:
        distance = np.nan
    low, high = CUTOFFS
    if not low <= distance <= high:
        raise DataError(f"max_distance is {text}: write a number from {low:g} to {high:g}, in Angstrom")
    return distance


def _site(position: Any, chains: dict[str, Chain]) -> Site:
    if not isinstance(position, list) or len(position) != 3 or position[0] not in chains or not position[1].isdigit():
        raise DataError(f"{position} is no atom: write [CHAIN, NUMBER, ATOM] with a chain of the sequences")
    name, number, atom = position[0], int(position[1]), position[2]
    sequence = chains[name].sequence
    if not 1 <= number <= len(sequence):
        raise DataError(f"chain {name} has no residue {number}")
    if atom.encode() not in component(sequence[number - 1]).names.tolist():
        raise DataError(f"residue {number} of chain {name} is {sequence[number - 1]}, which has no atom {atom}")
    return Site(name, number - 1, atom)


def _chain(name: Any, structure: Structure) -> int:
    names = [chain["name"] for chain in structure.meta["chains"]]
    if name not in names:
        raise DataError(f"a constraint or template names chain {name}, which is not among the sequences")
    return names.index(name)


def _tokens(position: Any, structure: Structure) -> np.ndarray:
    """(1,) token of a position."""
    if not isinstance(position, list) or len(position) != 2:
        raise DataError(f"{position} is no position: write [CHAIN, NUMBER], or [CHAIN, ATOM] of a ligand")
    asym_id = _chain(position[0], structure)
    own = np.flatnonzero(structure.asym_id == asym_id)
    if structure.chains["mol_type"][asym_id] == NONPOLYMER:
        names = structure.comp_atom_name[structure.ref_atom[structure.atom_start[own]]]
        found = own[names == position[1].encode()][:1]
    else:
        found = own[structure.res_index[own] == (int(position[1]) - 1 if position[1].isdigit() else -1)]
    if not len(found):
        raise DataError(f"chain {position[0]} has no {position[1]}")
    return found


def read_templates(templates: list[Any], structure: Structure, folder: Path) -> list[Template]:
    """Templates: ``cif`` or ``pdb`` with ``chain_id`` (default: every protein) and ``template_id``, one for each.

    Where the file has one protein chain ``template_id`` may be left out; each chain then has a template of its own.
    """
    found: list[Template] = []
    for fields in templates:
        known = {"cif", "pdb", "chain_id", "template_id"}
        if not isinstance(fields, dict) or not set(fields) <= known or ("cif" in fields) == ("pdb" in fields):
            raise DataError("a template has the fields cif or pdb, chain_id and template_id")
        name = fields.get("cif") or fields.get("pdb")
        path = next((candidate for candidate in (folder / name, Path(name)) if candidate.is_file()), None)
        if path is None:
            raise DataError(f"there is no template {name}")
        shown, _ = read_structure(path)
        proteins = _proteins(structure)
        chains = [_chain(name, structure) for name in _as_list(fields.get("chain_id"))] or list(proteins.values())
        if not set(chains) <= set(proteins.values()):
            raise DataError(f"template {name} is for a chain that is not a protein")
        own = _proteins(shown)
        names = _as_list(fields.get("template_id"))
        if not names and len(own) == 1:
            found += [make_template(shown, structure, [(chain, *own.values())]) for chain in chains]
        elif len(names) != len(chains) or not set(names) <= set(own):
            raise DataError(
                f"template {name} needs a template_id for each of {len(chains)} chains: it has {', '.join(own)}"
            )
        else:
            found.append(make_template(shown, structure, [(c, own[name]) for c, name in zip(chains, names)]))
    return found


def _proteins(structure: Structure) -> dict[str, int]:
    chains = enumerate(structure.meta["chains"])
    return {chain["name"]: asym_id for asym_id, chain in chains if chain["type"] == "protein"}


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
