"""Train and run the stock package's whole Boltz-2 on given crops; needs only the ``boltz`` package.

    python boltz_whole.py train FOLDER
    python boltz_whole.py run FOLDER

``train`` reads ``settings`` (arguments of Boltz2), ``state`` and ``samples`` from train.pt; a sample is a batch of one
complex: ``feats`` in the package's dense forms, ``normals``, what each call for normal deviates returns, and the truth
that confidences are measured by, ``coords`` and ``resolved`` of each sampled structure. It writes the model as the
package's training does to stock.ckpt, and to trained.pt ``losses`` and gradients ``grads`` of the package's own
training_step, means over the complexes, and ``trajectories``: of each complex the structures that each step of sampling
starts from, with their noise, and those that the last one ends with, (steps + 1, structures, atoms, 3). ``run`` loads
out.ckpt strictly and, of ``feats``, ``noisy`` atoms, their noise levels ``sigmas`` and ``recycling_steps`` in run.pt,
writes to ran.pt what the trunk, one denoising and the heads return. All is computed in the dtype of the features.

The package cannot train its model as it is. What is worked around, without touching the arithmetic:

- it reads ``validate_structure`` and never sets it;
- steering, which only prediction sets, is read in training too, and ``symmetry_correction`` has no default;
- it gives the truth of a complex with several noised copies a shape that it then refuses, and renames it by a search
  that ours differs from: the truth is given;
- logging needs a trainer.
"""

import sys
from pathlib import Path

import torch
from boltz.model.layers import initialize
from boltz.model.models import boltz2
from omegaconf import OmegaConf

NO_STEERING = {"fk_steering": False, "physical_guidance_update": False, "contact_guidance_update": False}
OUTPUTS = ("s", "z", "pdistogram", "pbfactor", "sample_atom_coords")
OUTPUTS += ("plddt_logits", "resolved_logits", "pde_logits", "pae_logits")
OWN_LOSSES = {"mse_loss": "diffusion", "smooth_lddt_loss": "smooth_lddt"}

# Weights are replaced.
initialize.trunc_normal_init_ = lambda *args, **kwargs: None


def compute_in(dtype):
    """The package casts to fp32 in many places, which a comparison in fp64 must not."""
    if dtype == torch.float64:
        torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64
        torch.set_default_dtype(dtype)


def build(settings):
    given = {name: OmegaConf.create(x) if name.endswith("_args") else x for name, x in settings.items()}
    return boltz2.Boltz2(**given, validate_structure=True, validators=[], steering_args=NO_STEERING)


def recorded(function, found, names):
    """The function, whose losses are noted under their names."""

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        found.update(names(result))
        return result

    return wrapper


def train_one(model, sample):
    """Losses and sampled structures of one complex; adds to the gradients."""
    found, normals = {}, iter(sample["normals"])
    torch.randn = lambda size, **_: next(normals).reshape(size)
    torch.randn_like = lambda x: next(normals).reshape(x.shape)
    truth = {"true_coords": sample["coords"][:, None], "true_coords_resolved_mask": sample["resolved"]}
    model.get_true_coordinates = lambda *args, **kwargs: truth
    kept = boltz2.distogram_loss, boltz2.bfactor_loss_fn, boltz2.confidence_loss, model.structure_module.compute_loss
    boltz2.distogram_loss = recorded(kept[0], found, lambda result: {"distogram": result[0]})
    boltz2.bfactor_loss_fn = recorded(kept[1], found, lambda result: {"bfactor": result})
    boltz2.confidence_loss = recorded(
        kept[2], found, lambda result: {name.removesuffix("_loss"): x for name, x in result["loss_breakdown"].items()}
    )
    model.structure_module.compute_loss = recorded(
        kept[3], found, lambda result: {OWN_LOSSES[name]: x for name, x in result["loss_breakdown"].items()}
    )
    sampled, structures = [], model.structure_module
    denoise, sample_all = structures.preconditioned_network_forward, structures.sample

    def denoise_noted(noisy, *args, **kwargs):
        # Without gradients structures are sampled; with them copies of the truth are denoised.
        if not torch.is_grad_enabled():
            sampled.append(noisy)
        return denoise(noisy, *args, **kwargs)

    def sample_noted(*args, **kwargs):
        result = sample_all(*args, **kwargs)
        sampled.append(result["sample_atom_coords"])
        return result

    structures.preconditioned_network_forward, structures.sample = denoise_noted, sample_noted
    found["loss"] = model.training_step(dict(sample["feats"]), 0)
    found["loss"].backward()
    structures.preconditioned_network_forward, structures.sample = denoise, sample_all
    boltz2.distogram_loss, boltz2.bfactor_loss_fn, boltz2.confidence_loss, model.structure_module.compute_loss = kept
    assert next(normals, None) is None, "the package drew less than it was given"
    losses = {name: x.detach() for name, x in found.items() if not name.startswith("rel_")}
    return losses, torch.stack(sampled).detach()


def train(folder):
    given = torch.load(folder / "train.pt", weights_only=True)
    dtype = given["samples"][0]["feats"]["coords"].dtype
    compute_in(dtype)
    model = build(given["settings"])
    model.load_state_dict(given["state"], strict=True)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(checkpoint | {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.5.0"}, folder / "stock.ckpt")

    model = model.to(dtype).train()
    model.validate_structure = False
    model.train_confidence_loss_logger = torch.nn.Identity()
    model.log, model.training_log = (lambda *args, **kwargs: None), (lambda: None)
    model.train_confidence_loss_logger.update = lambda loss: None
    losses, trajectories = zip(*(train_one(model, sample) for sample in given["samples"]))
    count = len(losses)
    grads = {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}
    losses = {name: sum(one[name] for one in losses) / count for name in losses[0]}
    torch.save({"losses": losses, "grads": grads, "trajectories": list(trajectories)}, folder / "trained.pt")


def run(folder):
    given = torch.load(folder / "run.pt", weights_only=True)
    feats, sigmas = given["feats"], given["sigmas"]
    compute_in(feats["coords"].dtype)
    model = boltz2.Boltz2.load_from_checkpoint(folder / "out.ckpt", strict=True, map_location="cpu").to(feats["coords"])

    def denoise(s_trunk, s_inputs, feats, diffusion_conditioning, **_):
        known = {"s_trunk": s_trunk, "s_inputs": s_inputs, "feats": feats, "multiplicity": len(sigmas)}
        known["diffusion_conditioning"] = diffusion_conditioning
        coords = model.structure_module.preconditioned_network_forward(given["noisy"], sigmas, known)
        return {"sample_atom_coords": coords}

    # One step in place of all.
    model.structure_module.sample = denoise
    with torch.no_grad():
        found = model.eval()(feats, given["recycling_steps"], diffusion_samples=len(sigmas))
    torch.save({name: found[name] for name in OUTPUTS}, folder / "ran.pt")


{"train": train, "run": run}[sys.argv[1]](Path(sys.argv[2]))
