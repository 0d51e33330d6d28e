"""Diffusion loss (AlphaFold 3, equations 3 to 6; the package's ``AtomDiffusion.compute_loss``), by shards of atoms.

The smooth lDDT, which the package adds to it, is in :mod:`cpfold_train.losses.smooth_lddt`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpfold_train.ops.rigid_align import weighted_rigid_align
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.redistribute import all_reduce
from cpfold_train.vocabulary import DNA, NONPOLYMER, RNA

OP = "diffusion_loss"


def diffusion_loss(
    denoised_coords: Tensor,
    true_coords: Tensor,
    sigmas: Tensor,
    feats: dict[str, Tensor],
    cp: ContextParallel,
    sigma_data: float,
    nucleotide_loss_weight: float = 5.0,
    ligand_loss_weight: float = 10.0,
) -> Tensor:
    """This rank's part of each diffusion sample's loss; the sum over the ranks is the loss.

    The squared error to the ground truth, which is first superposed on the prediction, weighted by the kind of molecule
    and by the noise level. Computed in fp32 (or fp64).

    Args:
        denoised_coords: (B*M, A/P, 3) in Angstrom, shard of atoms.
        true_coords: (B*M, A/P, 3), as they were before noise was added.
        sigmas: (B*M,) noise levels.
        feats: ``atom_resolved_mask`` and ``atom_to_token`` (B, A/P), shards of atoms, and ``mol_type`` (B, N),
            replicated.
        cp: the running grid.
        sigma_data: standard deviation of coordinates in the data, in Angstrom: that of the diffusion process.
        nucleotide_loss_weight: what an atom of DNA or RNA counts more than one of a protein.
        ligand_loss_weight: the same of ligands.

    Returns:
        (B*M,).
    """
    dtype = torch.promote_types(denoised_coords.dtype, torch.float32)
    pred, truth, sigmas = denoised_coords.to(dtype), true_coords.to(dtype), sigmas.to(dtype)
    weights = atom_weights(feats, nucleotide_loss_weight, ligand_loss_weight).to(dtype)
    resolved = feats["atom_resolved_mask"].to(dtype)
    weights, resolved = (x.repeat_interleave(len(pred) // len(x), 0) for x in (weights, resolved))
    aligned = weighted_rigid_align(truth, pred.detach(), weights, resolved, cp)

    weights = weights * resolved
    total = all_reduce(weights.sum(1), cp, cp.all, OP)
    error = ((pred - aligned).square().sum(-1) * weights).sum(1) / (3 * total + 1e-5)
    return error * (sigmas.square() + sigma_data**2) / (sigmas * sigma_data).square()


def atom_weights(feats: dict[str, Tensor], nucleotide_loss_weight: float, ligand_loss_weight: float) -> Tensor:
    """What each atom counts, (B, A/P): 1, and more in nucleic acids and ligands."""
    mol_type = feats["mol_type"].gather(1, feats["atom_to_token"].long())
    nucleic = (mol_type == DNA) | (mol_type == RNA)
    return 1 + nucleotide_loss_weight * nucleic + ligand_loss_weight * (mol_type == NONPOLYMER)
