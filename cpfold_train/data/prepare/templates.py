"""Lay the template structures that a table names on an entry's chains."""

from __future__ import annotations

from pathlib import Path

from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.features.templates import Template
from cpfold_train.data.prepare.msas import table_rows
from cpfold_train.data.structures.parse import read_structure
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError

TemplateFile = tuple[Path, tuple[tuple[str, str], ...]]
"""A structure, and pairs of names (chain of the entry, chain of the template) that are aligned with each other."""


def find_templates(table: Path | None) -> dict[str, list[TemplateFile]]:
    """Templates by entry, in the order of the table: lines of entry, chain, path and chain of the template.

    Lines of the same entry and path are one template, in which the entry's chains see each other.

    Raises:
        ConfigError: the table or a file that it names does not exist.
    """
    by_entry: dict[str, dict[Path, list[tuple[str, str]]]] = {}
    for entry, chain, path, shown in table_rows(table, "--templates", ("entry", "chain", "path", "template chain")):
        by_entry.setdefault(entry, {}).setdefault(path, []).append((chain, shown))
    return {entry: [(path, tuple(pairs)) for path, pairs in files.items()] for entry, files in by_entry.items()}


def align_templates(structure: Structure, files: list[TemplateFile], problems: list[str]) -> list[Template]:
    """Templates of an entry; what is wrong with one is added to ``problems``, and that template or chain left out."""
    own, found = _protein_chains(structure), []
    for path, pairs in files:
        try:
            template, _ = read_structure(path)
        except (DataError, OSError) as error:
            problems.append(f"template {path.name}: {error}")
            continue
        other, laid = _protein_chains(template), {}
        for chain, shown in pairs:
            if chain not in own:
                problems.append(f"template {path.name}: the entry has no protein chain {chain}")
            elif shown not in other:
                problems.append(f"template {path.name}: it has no protein chain {shown}")
            elif own[chain] in laid:
                problems.append(f"template {path.name}: chain {chain} is there twice")
            else:
                laid[own[chain]] = other[shown]
        if laid:
            made = make_template(template, structure, list(laid.items()))
            if len(made.token):
                found.append(made)
            else:
                problems.append(f"template {path.name}: no residue of it is aligned with one of the entry's")
    return found


def _protein_chains(structure: Structure) -> dict[str, int]:
    """Chains by name. Authors' names go before those of mmCIF."""
    chains = [(i, chain) for i, chain in enumerate(structure.meta["chains"]) if chain["type"] == "protein"]
    return {chain["name"]: i for i, chain in chains} | {chain["auth_name"]: i for i, chain in reversed(chains)}
