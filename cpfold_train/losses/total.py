"""All losses of a training step, each on its own.

AlphaFold 3, supplement 4.4; ``boltz/model/models/boltz2.py`` (training_step). Every function returns this rank's part
of each sample's losses, (B,), to be summed over ranks: the mean over the M diffusion samples of each of B complexes.

All losses are computed without mixed precision: these two functions are where the region begins, and those that they
call rely on it.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from cpfold_train.losses.bfactor import bfactor_loss
from cpfold_train.losses.confidence import confidence_targets, pae_loss, pde_loss, plddt_loss, resolved_loss
from cpfold_train.losses.diffusion import diffusion_loss
from cpfold_train.losses.distogram import distogram_loss
from cpfold_train.losses.smooth_lddt import smooth_lddt_loss
from cpfold_train.losses.symmetry import matched_truth
from cpfold_train.model.layers import without_autocast
from cpfold_train.parallel.context import ContextParallel, to_local

Values = dict[str, Tensor | DTensor]


def structure_losses(out: Values, feats: Values, cp: ContextParallel, sigma_data: float) -> dict[str, Tensor]:
    """``diffusion``, ``smooth_lddt``, ``distogram`` and ``bfactor``.

    Args:
        out: what :meth:`cpfold_train.model.cofolding.CoFolding.forward` returned.
        feats: what it was given.
        cp: the running grid.
        sigma_data: of the diffusion process, in Angstrom.
    """
    with without_autocast(feats["coords"]):
        out, feats = to_local(out), to_local(feats)
        denoised, truth = out["denoised_atom_coords"], out["aligned_true_atom_coords"]
        samples = len(feats["coords"]), -1
        return {
            "diffusion": diffusion_loss(denoised, truth, out["sigmas"], feats, cp, sigma_data).view(samples).mean(1),
            "smooth_lddt": smooth_lddt_loss(denoised, feats, cp).view(samples).mean(1),
            "distogram": distogram_loss(out["pdistogram"], feats, cp),
            "bfactor": bfactor_loss(out["pbfactor"], feats, cp),
        }


def confidence_losses(logits: Values, coords: Tensor, feats: Values, cp: ContextParallel) -> dict[str, Tensor]:
    """``plddt``, ``resolved``, ``pde`` and ``pae``, against the truth with its symmetric chains and atoms named as each
    structure has them.

    Args:
        logits: what :meth:`cpfold_train.model.cofolding.CoFolding.predict_confidence` returned.
        coords: (B M, A/P, 3), the sampled structures that it was given.
        feats: what the trunk was given.
        cp: the running grid.
    """
    with without_autocast(coords):
        feats = to_local(feats)
        samples = len(feats["coords"]), -1
        targets = confidence_targets(coords, *matched_truth(coords, feats, cp), cp)
        losses = {
            "plddt": plddt_loss(logits["plddt_logits"], targets, feats, cp),
            "resolved": resolved_loss(logits["resolved_logits"], targets, feats, cp),
            "pde": pde_loss(logits["pde_logits"], targets, feats, cp),
            "pae": pae_loss(logits["pae_logits"], targets, feats, cp),
        }
        return {name: loss.view(samples).mean(1) for name, loss in losses.items()}
