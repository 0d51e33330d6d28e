"""Read sequences to predict: FASTA and YAML as the ``boltz`` package takes them.

A FASTA record is ``>CHAIN|protein`` (``dna``, ``rna``), with a third field for the alignment of a protein, or
``>CHAIN|ccd`` with the code of a ligand. YAML is the package's schema, version 1; what it may say beside the sequences
is in :mod:`cpfold_train.data.inputs.hints`. Structures of SMILES are not built: a ligand is named by its code in the
Chemical Component Dictionary (CCD).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import biotite.structure as struc
import numpy as np
import yaml

from cpfold_train.data.alignments.a3m import merge, read_alignment
from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.inputs.complex import Complex
from cpfold_train.data.inputs.hints import links_of, read_conditions, read_templates
from cpfold_train.data.structures.components import component
from cpfold_train.data.structures.entry import Chain, Entry
from cpfold_train.data.structures.parse import build, chain_letters, entry_id
from cpfold_train.data.structures.residues import letter_table
from cpfold_train.data.structures.structure import Structure
from cpfold_train.errors import DataError, in_one_line
from cpfold_train.vocabulary import DNA, NONPOLYMER, PROTEIN, RNA, TOKENS

SUFFIXES = (".fasta", ".fa", ".yaml", ".yml")
MAX_ROWS = 16384
"""Most rows that are kept of an alignment before the model's are drawn from them."""

_KINDS = {"protein": PROTEIN, "dna": DNA, "rna": RNA, "ligand": NONPOLYMER}
_KEYS = {"id", "sequence", "msa", "modifications", "cyclic", "ccd"}
_SECTIONS = {"version", "sequences", "constraints", "templates"}
_NO_SMILES = "SMILES are not read: name the ligand by its code in the Chemical Component Dictionary (ccd)"

Item = tuple[str, dict[str, Any]]
"""Kind of molecule, and what the file says of it."""


def read_sequences(path: Path) -> Complex:
    """A complex of which only sequences are known.

    Raises:
        DataError: one sentence on what to change.
    """
    try:
        text = path.read_text()
        schema = _fasta(text) if path.suffix in (".fasta", ".fa") else _yaml(text)
        items = [_item(item) for item in _listed(schema, "sequences")]
        chains = [chain for item in items for chain in _chains(*item)]
        _check(chains)
        constraints = _listed(schema, "constraints")
        closed = [name for _, fields in items if fields.get("cyclic") == "true" for name in _names(fields)]
        meta = {"id": entry_id(path), "source": path.name, "title": None, "method": None}
        meta |= {"resolution": None, "release_date": None}
        structure = build(Entry(chains, meta, links_of(constraints, chains, closed)))
        structure.meta["interfaces"] = []
        alignments = _alignments(structure, items, path.parent)
        templates = read_templates(_listed(schema, "templates"), structure, path.parent)
        return Complex(structure, alignments, templates, read_conditions(constraints, structure))
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # what a person has written can have any form anywhere
        raise DataError(f"{path.name} cannot be read: {in_one_line(error)}") from error


def _fasta(text: str) -> dict[str, Any]:
    """The records in the form of the YAML schema."""
    sequences: list[dict[str, dict[str, Any]]] = []
    letters: list[list[str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith(">"):
            name, kind, msa = [*(part.strip() for part in line[1:].split("|", 2)), "", ""][:3]
            if kind.lower() == "smiles":
                raise DataError(_NO_SMILES)
            if not name or kind.lower() not in ("protein", "dna", "rna", "ccd"):
                raise DataError(f"{line} does not say what it is: write >CHAIN|protein, |dna, |rna or |ccd")
            sequences.append({kind.lower(): {"id": name, "msa": msa.split()[0] if msa else ""}})
            letters.append([])
        elif not letters:
            raise DataError("the first line is not a header: write >CHAIN|protein before the sequence")
        else:
            letters[-1].append(line)
    for number, (record, lines) in enumerate(zip(sequences, letters)):
        (kind, fields), sequence = next(iter(record.items())), "".join(lines)
        if kind == "ccd":
            sequences[number] = {"ligand": {"id": fields["id"], "ccd": sequence}}
        else:
            fields["sequence"] = sequence
    return {"sequences": sequences}


def _yaml(text: str) -> dict[str, Any]:
    # Every scalar stays text: a chain called NO is not false, and the component 1E3 is not a number.
    schema = yaml.load(text, Loader=yaml.BaseLoader)
    if not isinstance(schema, dict) or "sequences" not in schema:
        raise DataError("it has no section sequences")
    if schema.get("version", "1") != "1":
        raise DataError(f"it has version {schema['version']} of the schema, and this program reads version 1")
    if other := set(schema) - _SECTIONS:
        raise DataError(f"its section {min(other)} is not supported: leave it out")
    return schema


def _listed(schema: dict[str, Any], section: str) -> list[Any]:
    found = schema.get(section) or []
    if not isinstance(found, list):
        raise DataError(f"its section {section} is not a list")
    return found


def _item(item: Any) -> Item:
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(next(iter(item.values())), dict):
        raise DataError("an entry of sequences is not one protein, dna, rna or ligand with its fields")
    ((kind, fields),) = item.items()
    if kind not in _KINDS:
        raise DataError(f"sequences holds a {kind}: write protein, dna, rna or ligand")
    if "smiles" in fields:
        raise DataError(_NO_SMILES)
    if other := set(fields) - _KEYS:
        raise DataError(f"a {kind} has no field {min(other)}")
    for needed in ("id", "ccd" if kind == "ligand" else "sequence"):
        if not fields.get(needed):
            raise DataError(f"a {kind} lacks its {needed}")
    return kind, fields


def _names(fields: dict[str, Any]) -> list[str]:
    return [fields["id"]] if isinstance(fields["id"], str) else fields["id"]


def _chains(kind: str, fields: dict[str, Any]) -> list[Chain]:
    """A chain, none of whose atoms is resolved, for each of the item's names."""
    if kind == "ligand":
        residues = [fields["ccd"]] if isinstance(fields["ccd"], str) else list(fields["ccd"])
        residues = [name.strip().upper() for name in residues]
        for name in residues:
            _check_component(name)
    else:
        residues = _residues(_KINDS[kind], fields["sequence"])
        for change in fields.get("modifications") or []:
            position = change.get("position", "")
            if not position.isdigit() or not 1 <= int(position) <= len(residues) or "ccd" not in change:
                raise DataError(f"a modification needs a position from 1 to {len(residues)} and a ccd")
            _check_component(change["ccd"])
            residues[int(position) - 1] = change["ccd"]
    nothing = struc.AtomArray(0)
    nothing.set_annotation("b_factor", np.zeros(0))
    none = np.zeros(0, dtype=np.int64)
    return [Chain(name, name, _KINDS[kind], list(residues), nothing, none) for name in _names(fields)]


def _residues(mol_type: int, sequence: str) -> list[str]:
    letters = "".join(sequence.split()).upper()
    if not (letters.isascii() and letters.isalpha()):
        raise DataError("a sequence has other characters than letters")
    return [TOKENS[token] for token in letter_table(mol_type)[np.frombuffer(letters.encode(), np.uint8)].tolist()]


def _check_component(name: str) -> None:
    if component(name) is None:
        raise DataError(f"the Chemical Component Dictionary has no {name}")


def _check(chains: list[Chain]) -> None:
    names = [chain.name for chain in chains]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"two chains are called {min(twice)}")
    if all(chain.mol_type == NONPOLYMER for chain in chains):
        raise DataError("it holds no protein, dna or rna")


def _alignments(structure: Structure, items: list[Item], folder: Path) -> dict[int, Alignment]:
    chains = {chain["name"]: asym_id for asym_id, chain in enumerate(structure.meta["chains"])}
    found: dict[int, Alignment] = {}
    named: dict[int, str] = {}
    for kind, fields in items:
        asym_id = chains[_names(fields)[0]]
        entity, name = structure.meta["chains"][asym_id]["entity"], fields.get("msa") or ""
        if named.setdefault(entity, name) != name:
            raise DataError(f"chains of one sequence have different alignments, {named[entity] or 'none'} and {name}")
        if name in ("", "empty") or entity in found:
            continue
        path = next((candidate for candidate in (folder / name, Path(name)) if candidate.is_file()), None)
        if path is None:
            raise DataError(f"there is no alignment {name}")
        found[entity] = merge([read_alignment(path, _KINDS[kind], chain_letters(structure, asym_id))], MAX_ROWS)
    return found
