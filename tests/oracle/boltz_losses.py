"""The stock package's losses of structures and confidences, in fp64; needs only the ``boltz`` package.

    python boltz_losses.py IN.pt OUT.pt

IN.pt holds a list of samples, each with ``feats`` (B = 1, index forms) and ``given`` (predictions and logits of M
diffusion samples). OUT.pt gets for each, by loss, its value and its gradient with respect to the logits of that name,
or else to the predicted coordinates.
"""

import sys
from types import SimpleNamespace

import boltz.model.loss.diffusionv2 as structure_losses
import torch
from boltz.model.loss import confidencev2 as confidence
from boltz.model.loss.bfactor import bfactor_loss_fn
from boltz.model.modules.diffusionv2 import AtomDiffusion


class Double:
    """torch with fp64 under the name of fp32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def dense(feats):
    """The package's matrices in place of indices."""
    feats = dict(feats)
    atoms = feats["coords"].shape[1]
    real = feats["token_pad_mask"][..., None]

    def one_hot(index, size):
        return torch.nn.functional.one_hot(index.long(), size).double()

    chosen = (feats["token_resolved_mask"][0] > 0) & (feats["mol_type"][0] != 3)
    feats["r_set_to_rep_atom"] = one_hot(feats["token_to_center_atom"][:, chosen], atoms)
    feats["token_to_rep_atom"] = one_hot(feats["token_to_rep_atom"], atoms) * real
    feats["atom_to_token"] = one_hot(feats["atom_to_token"], real.shape[1]) * feats["atom_pad_mask"][..., None]
    feats["frames_idx"] = feats["frames_idx"].long()
    return feats


def losses_of(feats, given):
    samples = len(given["pred_coords"])
    feats = dense(feats)
    feats["coords"] = feats["coords"].repeat_interleave(samples, 0)
    resolved = feats["atom_resolved_mask"].repeat_interleave(samples, 0)

    model = SimpleNamespace(sigma_data=16.0, zero=torch.zeros(()))
    model.loss_weight = lambda sigma: AtomDiffusion.loss_weight(model, sigma)
    out = {"denoised_atom_coords": given["pred_coords"], "sigmas": given["sigmas"]}
    out["aligned_true_atom_coords"] = given["turned_coords"]
    structure = AtomDiffusion.compute_loss(model, feats, out, multiplicity=samples)["loss_breakdown"]

    against = (given["pred_coords"].detach(), feats, feats["coords"], resolved)
    return {
        "diffusion": structure["mse_loss"],
        "smooth_lddt": structure["smooth_lddt_loss"],
        "bfactor": bfactor_loss_fn({"pbfactor": given["bfactor"]}, feats),
        "plddt": confidence.plddt_loss(given["plddt"], *against, token_level_confidence=True, multiplicity=samples)[0],
        "resolved": confidence.resolved_loss(
            given["resolved"], feats, resolved, token_level_confidence=True, multiplicity=samples
        ),
        "pde": confidence.pde_loss(given["pde"], *against, samples)[0],
        "pae": confidence.pae_loss(given["pae"], *against, samples)[0],
    }


def main(source, target):
    torch.Tensor.float = torch.Tensor.double
    structure_losses.torch = Double()
    results = []
    for sample in torch.load(source, weights_only=True):
        given, found = sample["given"], {}
        for name in given.keys() - {"turned_coords", "sigmas"}:
            given[name].requires_grad_()
        for name, loss in losses_of(sample["feats"], given).items():
            leaf = given.get(name, given["pred_coords"])
            found[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
        results.append(found)
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
