"""Clusters of similar chains, by which training weighs samples and validation is kept apart.

As AlphaFold 3 has it (supplement 2.5.3): proteins with 40 % identical residues, peptides of fewer than ten residues and
nucleic acids with the same sequence, ligands of the same components.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from biotite.sequence import ProteinSequence
from biotite.sequence.align import KmerTable, SubstitutionMatrix, align_optimal

from cpfold_train.data.prepare.convert import Conversion
from cpfold_train.errors import ConfigError, DataError

IDENTITY = 0.4
COVERAGE = 0.8
"""Part of the longer sequence that the alignment must cover (the default of MMseqs2's easy-cluster)."""

SHORTEST = 10
"""Residues below which a protein is clustered with equal ones only."""

_WORD = 3
_CANDIDATES = 20
_MATRIX = SubstitutionMatrix.std_protein_matrix()


def entity_clusters(results: list[Conversion], table: Path | None) -> dict[tuple[str, int], str]:
    """Cluster of each entity, by sample and number of the entity.

    A cluster is named after what it holds: the first chain with the representative sequence, or the ligand.

    Args:
        results: of the entries that are kept, in the order of their keys.
        table: clusters that somebody made (see :func:`read_clusters`); what it does not list is clustered with equal
            sequences only. None to cluster by sequence.
    """
    entities = {(result.key, number): entity for result in results for number, entity in enumerate(result.entities)}
    first: dict[tuple[str, str], str] = {}
    for (key, _), entity in entities.items():
        first.setdefault((entity["type"], entity["sequence"]), f"{key}_{entity['chains'][0]}")
    similar = {}
    if table is None:
        proteins = [text for kind, text in first if kind == "protein" and len(text) >= SHORTEST]
        similar = cluster_proteins(proteins)
    listed = {} if table is None else read_clusters(table)
    clusters = {}
    for (key, number), entity in entities.items():
        kind, text = entity["type"], entity["sequence"]
        names = [hashlib.sha256(text.encode()).hexdigest(), *(f"{key}_{chain}" for chain in entity["chains"])]
        given = next((listed[name] for name in names if name in listed), None)
        if kind == "nonpolymer":
            clusters[key, number] = f"ligand:{text}"
        elif given is not None:
            clusters[key, number] = given
        else:
            clusters[key, number] = f"{kind}:{first[kind, similar.get(text, text) if kind == 'protein' else text]}"
    return clusters


def read_clusters(path: Path) -> dict[str, str]:
    """Clusters by ``ENTRY_CHAIN`` or by the sequence's SHA-256: two tab-separated columns, or Boltz's manifest.json."""
    if not path.is_file():
        raise ConfigError(f"--clusters {path} does not exist: type the path of a tab-separated file or a manifest.json")
    if path.suffix == ".json":
        manifest = json.loads(path.read_text())
        records = manifest["records"] if isinstance(manifest, dict) else manifest
        return {
            f"{record['id'].lower()}_{chain['chain_name']}": str(chain["cluster_id"])
            for record in records
            for chain in record["chains"]
        }
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row]
    if any(len(row) != 2 for row in rows):
        raise ConfigError(f"--clusters {path} needs two tab-separated columns: ENTRY_CHAIN or SHA-256, and the cluster")
    clusters = {}
    for name, cluster in rows:
        entry, chain = name.split("_", 1) if "_" in name else (name, "")
        clusters[f"{entry.lower()}_{chain}" if chain else entry.lower()] = cluster
    return clusters


def cluster_proteins(sequences: list[str]) -> dict[str, str]:
    """Representative of each sequence: by MMseqs2 if it is installed, else by :func:`greedy_clusters`."""
    if not sequences:
        return {}
    return mmseqs_clusters(sequences) if shutil.which("mmseqs") else greedy_clusters(sequences)


def mmseqs_clusters(sequences: list[str]) -> dict[str, str]:
    """Run ``mmseqs easy-cluster`` (Steinegger and Söding 2018)."""
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "sequences.fasta"
        fasta.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
        command = ["mmseqs", "easy-cluster", str(fasta), f"{folder}/out", f"{folder}/tmp"]
        command += ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"mmseqs easy-cluster failed: {done.stderr.strip() or done.stdout.strip()[-500:]}")
        rows = [line.split("\t") for line in Path(f"{folder}/out_cluster.tsv").read_text().splitlines()]
    return {sequences[int(member)]: sequences[int(representative)] for representative, member in rows}


def greedy_clusters(sequences: Iterable[str]) -> dict[str, str]:
    """Each sequence, from the longest on, joins the first representative that is similar, or becomes one.

    Representatives are tried in the order of how many words of three residues they have in common with the sequence.
    """
    order = sorted(set(sequences), key=lambda text: (-len(text), text))
    encoded = [ProteinSequence(text) for text in order]
    words = KmerTable.from_sequences(_WORD, encoded)
    representative = np.zeros(len(order), dtype=bool)
    found = {}
    for i, sequence in enumerate(encoded):
        shared = np.bincount(words.match(sequence)[:, 1], minlength=len(order)) * representative
        best = np.argsort(-shared, kind="stable")[:_CANDIDATES]
        match = next((j for j in best.tolist() if shared[j] and is_similar(sequence, encoded[j])), None)
        representative[i] = match is None
        found[order[i]] = order[i if match is None else match]
    return found


def is_similar(first: ProteinSequence, second: ProteinSequence) -> bool:
    """Whether the best local alignment has the identity and the coverage that a cluster asks for."""
    if min(len(first), len(second)) < COVERAGE * max(len(first), len(second)):
        return False
    trace = align_optimal(first, second, _MATRIX, gap_penalty=(-11, -1), local=True, max_number=1)[0].trace
    paired = trace[(trace >= 0).all(axis=1)]
    same = (first.code[paired[:, 0]] == second.code[paired[:, 1]]).sum()
    return len(paired) >= COVERAGE * max(len(first), len(second)) and same >= IDENTITY * len(trace)
