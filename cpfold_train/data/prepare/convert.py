"""One entry to one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cpfold_train.data.alignments.a3m import is_joined
from cpfold_train.data.alignments.alignment import Alignment, pack_alignments
from cpfold_train.data.alignments.pairing import told_pairing
from cpfold_train.data.features.contacts import interfaces
from cpfold_train.data.features.templates import pack_templates
from cpfold_train.data.prepare.boltz_format import read_boltz
from cpfold_train.data.prepare.filters import Limits, fit_chains, unfit_entry
from cpfold_train.data.prepare.msas import AlignmentFile, align_entities, boltz_entities
from cpfold_train.data.prepare.sources import SourceFile
from cpfold_train.data.prepare.templates import TemplateFile, align_templates
from cpfold_train.data.stream.shards import MAX_NAME
from cpfold_train.data.stream.validate import check_sample
from cpfold_train.data.structures.parse import chain_letters, read_structure
from cpfold_train.data.structures.structure import Structure, pack_arrays, pack_structure
from cpfold_train.errors import DataError, in_one_line


@dataclass(frozen=True)
class Options:
    """What the person at the keyboard chose: biological assembly, limits, and most rows of an alignment."""

    assembly: str | None
    limits: Limits
    depth: int
    msa: Path | None


@dataclass(frozen=True)
class Job:
    """An entry, its alignment files and its templates."""

    source: SourceFile
    alignments: tuple[AlignmentFile, ...] = ()
    templates: tuple[TemplateFile, ...] = ()


@dataclass
class Conversion:
    """What became of one entry: a sample, or the reason why not.

    Attributes:
        entities: type, sequence (letters, or the names of a ligand's residues) and chains of each entity.
        left_out: residues that were not read, by reason.
        removed: chains that were not fit, by reason.
        pairing: sentences on the rows of its alignments that pair.
    """

    key: str
    source: str
    dropped: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    resolution: float | None = None
    release_date: str | None = None
    entities: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    msa_depth: dict[str, int] = field(default_factory=dict)
    pairing: list[str] = field(default_factory=list)
    templates: int = 0
    problems: list[str] = field(default_factory=list)


def convert(job: Job, options: Options) -> tuple[Conversion, dict[str, bytes]]:
    """Read, filter and pack one entry; a bad one is dropped with the reason, whatever is wrong with it.

    Returns:
        What became of it, and the sample's members by extension, none if it was dropped.
    """
    result = Conversion(key=job.source.key, source=job.source.path.name)
    try:
        members = _members(job, options, result)
        if any(len(f"{job.source.key}.{extension}".encode()) > MAX_NAME for extension in members):
            raise DataError(f"{job.source.path.name} has too long a name: rename it to at most 80 letters")
        return result, members
    except DataError as error:
        result.dropped = str(error)
    except Exception as error:  # an entry that nobody foresaw must not end the run of a hundred thousand others
        result.dropped = f"{job.source.path.name} cannot be prepared: {in_one_line(error)}"
    return result, {}


def _members(job: Job, options: Options, result: Conversion) -> dict[str, bytes]:
    path = job.source.path
    align: Callable[[Structure], dict[int, Alignment]]
    if path.suffix == ".npz":
        structure, left_out = read_boltz(path)
        align = partial(boltz_entities, path=path, folder=options.msa, depth=options.depth, problems=result.problems)
    else:
        structure, left_out = read_structure(path, options.assembly)
        align = partial(align_entities, files=list(job.alignments), depth=options.depth, problems=result.problems)
    structure, removed = fit_chains(structure, options.limits)
    meta = structure.meta
    result.left_out = {reason: count for reason, count in sorted(left_out.items()) if count}
    result.removed = dict(sorted(removed.items()))
    result.counts = meta["counts"]
    result.resolution, result.release_date = meta["resolution"], meta["release_date"]
    result.dropped = unfit_entry(structure, options.limits)
    if result.dropped:
        return {}
    alignments = align(structure)
    result.msa_depth = {str(entity): len(alignment) for entity, alignment in alignments.items()}
    result.pairing = told_pairing(meta["chains"], alignments)
    result.pairing += [
        f"{file.name} is ColabFold's alignment of several chains behind each other, and its pairs are lost: "
        "give an a3m for each chain, with labels that say paired"
        for file, _ in job.alignments
        if is_joined(file)
    ]
    result.entities = _entities(structure)
    meta["id"] = job.source.key
    meta["msa_depth"] = result.msa_depth
    if result.pairing:
        meta["pairing"] = result.pairing
    meta["interfaces"] = interfaces(structure)
    templates = align_templates(structure, list(job.templates), result.problems)
    result.templates = len(templates)
    # What training would refuse is dropped here, where somebody looks at the report.
    check_sample(structure, alignments, templates, job.source.key)
    members = pack_structure(structure)
    if alignments:
        members["msa.npz"] = pack_arrays(pack_alignments(alignments))
    if templates:
        members["templates.npz"] = pack_arrays(pack_templates(templates))
    return members


def _entities(structure: Structure) -> list[dict[str, Any]]:
    entities: dict[int, dict[str, Any]] = {}
    for asym_id, chain in enumerate(structure.meta["chains"]):
        if chain["entity"] not in entities:
            sequence = _sequence(structure, asym_id)
            entities[chain["entity"]] = {"type": chain["type"], "sequence": sequence, "chains": []}
        entities[chain["entity"]]["chains"].append(chain["auth_name"])
    return [entities[entity] for entity in sorted(entities)]


def _sequence(structure: Structure, asym_id: int) -> str:
    if structure.meta["chains"][asym_id]["type"] != "nonpolymer":
        return chain_letters(structure, asym_id)
    tokens = structure.asym_id == asym_id
    names = dict(zip(structure.res_index[tokens].tolist(), structure.component[tokens].tolist()))
    return "-".join(structure.comp_name[component].decode() for component in names.values())
