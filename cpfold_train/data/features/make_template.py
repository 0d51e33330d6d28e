"""From a template structure to what it shows of a sample, by aligning sequences."""

from __future__ import annotations

import numpy as np
from biotite.sequence import ProteinSequence
from biotite.sequence.align import SubstitutionMatrix, align_optimal

from cpfold_train.data.features.frames import backbone_atoms
from cpfold_train.data.features.templates import Template
from cpfold_train.data.structures.residues import THREE_LETTERS
from cpfold_train.data.structures.structure import Structure
from cpfold_train.vocabulary import TOKENS

GAP_PENALTY = (-11, -1)
"""To open and to extend a gap, in the units of BLOSUM62."""

_LETTER_OF = {name: letter for letter, name in THREE_LETTERS.items()}
_LETTERS = [_LETTER_OF.get(name, "X") for name in TOKENS]


def make_template(structure: Structure, query: Structure, chains: list[tuple[int, int]]) -> Template:
    """Align protein chains of a template structure with protein chains of the sample.

    Args:
        structure: the template's.
        query: the sample's.
        chains: pairs (chain of the query, chain of the template), each chain of the query at most once; the query's
            chains see each other as those of the template lie.
    """
    parts = [_aligned_tokens(structure, shown, query, covered) for covered, shown in sorted(chains)]
    token, shown = np.concatenate(parts, axis=1)
    atoms = backbone_atoms(structure)[shown]
    known = (atoms >= 0).all(axis=1) & structure.resolved[atoms].all(axis=1)
    disto_center, disto_known = structure.disto_center
    return Template(
        token=token.astype(np.int32),
        res_type=structure.res_type[shown],
        backbone=np.where(known[:, None, None], structure.coords[atoms], np.float32(0)),
        frame_known=known,
        center=structure.center[0][shown],
        disto_center=disto_center[shown],
        disto_known=disto_known[shown],
    )


def _aligned_tokens(structure: Structure, shown: int, query: Structure, covered: int) -> np.ndarray:
    """(2, P) tokens of chain ``covered`` of the query and those of chain ``shown`` that are aligned with them."""
    own, other = np.flatnonzero(query.asym_id == covered), np.flatnonzero(structure.asym_id == shown)
    sequences = (
        ProteinSequence("".join(_LETTERS[token] for token in of.res_type[tokens].tolist()))
        for of, tokens in ((query, own), (structure, other))
    )
    matrix = SubstitutionMatrix.std_protein_matrix()
    trace = align_optimal(*sequences, matrix, GAP_PENALTY, terminal_penalty=False, max_number=1)[0].trace
    first, second = trace[(trace >= 0).all(axis=1)].T
    return np.stack([own[first], other[second]])
