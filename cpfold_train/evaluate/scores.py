"""Scores of a predicted structure against the true one. Only atoms that both have count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import biotite.structure as struc
import numpy as np

from cpfold_train.data.features.contacts import cell_list
from cpfold_train.data.structures.structure import Structure
from cpfold_train.evaluate.interfaces import interface_scores
from cpfold_train.evaluate.match import Matched, match
from cpfold_train.evaluate.superpose import superposed_rmsd, superposition, tm_score

POCKET = 10.0
"""Angstrom to a ligand within which a residue belongs to its pocket (AlphaFold 3, methods)."""


@dataclass(frozen=True)
class Scores:
    """Scores of one sample; None where there is nothing to score.

    Attributes:
        lddt: of all atoms (Mariani et al., Bioinformatics 29, 2722, 2013).
        tm_score: of the polymers' center atoms (C-alpha, C1'), all chains as one.
        rmsd: in Angstrom of the same atoms after superposition.
        interface_lddt: of all pairs of atoms of different chains.
        fnat: fraction of the native contacts, mean over the pairs of polymer chains in contact.
        dockq: mean over these pairs.
        ligand_rmsd: in Angstrom, mean over the ligands, each after superposition of its pocket.
        chains: of the truth that have a partner.
        atoms: fraction of the truth's resolved atoms that the prediction has.
        interfaces: ``chains``, ``fnat``, ``irmsd``, ``lrmsd`` and ``dockq`` of each pair of polymer chains in contact.
        ligands: ``chain`` and ``rmsd`` of each.
    """

    lddt: float | None
    tm_score: float | None
    rmsd: float | None
    interface_lddt: float | None
    fnat: float | None
    dockq: float | None
    ligand_rmsd: float | None
    chains: int
    atoms: float
    interfaces: list[dict[str, Any]]
    ligands: list[dict[str, Any]]

    def numbers(self) -> dict[str, float | None]:
        """The scores that are single numbers."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, list)}


def score(truth: Structure, predicted: Structure) -> Scores:
    """Score a prediction.

    Raises:
        DataError: no polymer of the truth is in the prediction.
    """
    matched = match(truth, predicted)
    names = [chain["name"] for chain in truth.meta["chains"]]
    reference = _atom_array(matched)
    centers = matched.center
    interfaces = interface_scores(matched)
    for pair in interfaces:
        pair["chains"] = "-".join(names[chain] for chain in pair["chains"])
    ligands = [{"chain": names[chain], "rmsd": value} for chain, value in ligand_rmsds(matched).items()]
    enough = centers.sum() >= 3
    return Scores(
        lddt=_finite(struc.lddt(reference, matched.predicted)),
        tm_score=tm_score(matched.predicted[centers], matched.truth[centers]) if enough else None,
        rmsd=superposed_rmsd(matched.predicted[centers], matched.truth[centers]) if enough else None,
        interface_lddt=_finite(struc.lddt(reference, matched.predicted, exclude_same_chain=True)),
        fnat=_mean([pair["fnat"] for pair in interfaces]),
        dockq=_mean([pair["dockq"] for pair in interfaces]),
        ligand_rmsd=_mean([ligand["rmsd"] for ligand in ligands]),
        chains=len(matched.partners),
        atoms=len(matched.chain) / matched.resolved,
        interfaces=interfaces,
        ligands=ligands,
    )


def ligand_rmsds(matched: Matched) -> dict[int, float]:
    """RMSD in Angstrom of each ligand, by chain of the truth, as it lies once its pocket is superposed.

    The pocket are the center atoms of the residues with an atom within ``POCKET``, or all where these are fewer than
    three. Atoms go by their names: a ring or a phosphate that is turned onto itself counts as turned.
    """
    center = np.flatnonzero(matched.center)
    found = {}
    for chain in np.unique(matched.chain[~matched.polymer]).tolist():
        own = np.flatnonzero(matched.chain == chain)
        low, high = matched.truth[own].min(axis=0) - POCKET, matched.truth[own].max(axis=0) + POCKET
        near = matched.polymer & ((matched.truth > low) & (matched.truth < high)).all(axis=1)
        near = np.flatnonzero(near)
        cells = cell_list(matched.truth[own], POCKET)
        near = near[(cells.get_atoms(matched.truth[near], POCKET) >= 0).any(axis=1)] if len(near) else near
        residues = set(zip(matched.chain[near].tolist(), matched.residue[near].tolist()))
        pairs = zip(matched.chain[center].tolist(), matched.residue[center].tolist())
        pocket = center[[pair in residues for pair in pairs]]
        pocket = pocket if len(pocket) >= 3 else center
        onto_pocket = superposition(matched.predicted[pocket], matched.truth[pocket])
        found[chain] = float(struc.rmsd(matched.truth[own], onto_pocket.apply(matched.predicted[own])))
    return found


def _atom_array(matched: Matched) -> struc.AtomArray:
    atoms = struc.AtomArray(len(matched.chain))
    atoms.coord = matched.truth.astype(np.float32)
    atoms.chain_id = matched.chain.astype("U4")
    atoms.res_id = matched.residue
    atoms.atom_name = matched.name.astype("U6")
    return atoms


def _finite(value: float) -> float | None:
    """None for the score of no pair of atoms at all."""
    return float(value) if np.isfinite(value) else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
