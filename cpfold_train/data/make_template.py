"""From a template structure to what it shows of a sample, by aligning sequences."""

from __future__ import annotations

import numpy as np

from cpfold_train.data.align import align
from cpfold_train.data.frames import backbone_atoms
from cpfold_train.data.residues import PROTEIN
from cpfold_train.data.structure import Structure
from cpfold_train.data.templates import Template


def make_template(structure: Structure, query: Structure, chains: list[tuple[int, int]]) -> Template:
    """Lay chains of a template structure on chains of the sample.

    Args:
        structure: the template's.
        query: the sample's.
        chains: pairs (chain of the query, chain of the template) of polymers, each query chain at most once; the query
            chains see each other as they lie in the template.
    """
    parts = [_aligned_tokens(structure, shown, query, covered) for covered, shown in sorted(chains)]
    token, shown = np.concatenate(parts, axis=1)
    atoms = backbone_atoms(structure)[shown]
    known = (atoms >= 0).all(axis=1) & structure.resolved[atoms].all(axis=1)
    protein = structure.chains["mol_type"][structure.asym_id[shown]] == PROTEIN
    center, disto_center = structure.center, structure.disto_center
    return Template(
        token=token.astype(np.int32),
        res_type=structure.res_type[shown],
        backbone=np.where(known[:, None, None], structure.coords[atoms], np.float32(0)),
        frame_known=known & protein,
        center=center[0][shown],
        disto_center=disto_center[0][shown],
        disto_known=disto_center[1][shown],
    )


def _aligned_tokens(structure: Structure, shown: int, query: Structure, covered: int) -> np.ndarray:
    """(2, P) tokens of chain ``covered`` of the query and those of chain ``shown`` that stand in their places."""
    own, other = np.flatnonzero(query.asym_id == covered), np.flatnonzero(structure.asym_id == shown)
    names, other_names = (
        of.comp_name[of.component[tokens]].astype(str).tolist() for of, tokens in ((query, own), (structure, other))
    )
    place = align(names, other_names)
    found = place >= 0
    return np.stack([own[found], other[place[found]]])
