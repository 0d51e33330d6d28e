"""Run the stock Boltz-2 diffusion on given weights, features and draws; needs only the ``boltz`` package.

    python boltz_diffusion.py IN.pt OUT.pt

IN.pt holds ``sizes``, ``process``, ``state`` (Boltz-2 names), ``feats`` (in the package's dense forms), ``inputs``
(``s_inputs``, ``s_trunk``, ``z``, ``rel_pos``), ``multiplicity``, ``weight`` of the denoised coordinates in the loss
(None to sample in ``steps`` steps), and ``normals``: what each call for normal deviates returns. OUT.pt gets ``out``
and, where there is a loss, ``grads``.
"""

import sys

import torch
from boltz.model.modules.diffusion_conditioning import DiffusionConditioning
from boltz.model.modules.diffusionv2 import AtomDiffusion
from torch import nn

NO_STEERING = {"fk_steering": False, "physical_guidance_update": False, "contact_guidance_update": False}


class StockDiffusion(nn.Module):
    """Conditioning and structure module of the package's Boltz2."""

    def __init__(self, sizes, process):
        super().__init__()
        shared = {name: size for name, size in sizes.items() if name not in ("token_z", "atom_z", "dim_fourier")}
        self.diffusion_conditioning = DiffusionConditioning(
            token_z=sizes["token_z"], atom_z=sizes["atom_z"], atom_feature_dim=388, **shared
        )
        score_model = {**shared, "dim_fourier": sizes["dim_fourier"]}
        self.structure_module = AtomDiffusion(score_model, **process, alignment_reverse_diff=True)

    def forward(self, s_inputs, s_trunk, z, rel_pos, feats, multiplicity, steps):
        names = ("q", "c", "to_keys", "atom_enc_bias", "atom_dec_bias", "token_trans_bias")
        conditioning = dict(zip(names, self.diffusion_conditioning(s_trunk, z, rel_pos, feats)))
        shared = {"s_inputs": s_inputs, "s_trunk": s_trunk, "feats": feats, "diffusion_conditioning": conditioning}
        if steps is None:
            return self.structure_module(**shared, multiplicity=multiplicity)["denoised_atom_coords"]
        return self.structure_module.sample(
            feats["atom_pad_mask"], steps, multiplicity, steering_args=NO_STEERING, **shared
        )["sample_atom_coords"]


def main(source, target):
    given = torch.load(source, weights_only=True)
    # The package casts to fp32 in many places; the comparison is in fp64.
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64
    torch.set_default_dtype(torch.float64)
    module = StockDiffusion(given["sizes"], given["process"]).double().train(given["weight"] is not None)
    module.load_state_dict(given["state"], strict=True)
    normals = iter(given["normals"])
    torch.randn = lambda size, **_: next(normals).reshape(size)
    torch.randn_like = lambda x: next(normals).reshape(x.shape)
    inputs = {name: x.requires_grad_() for name, x in given["inputs"].items()}
    if given["weight"] is None:
        with torch.no_grad():
            out = module(**inputs, feats=given["feats"], multiplicity=given["multiplicity"], steps=given["steps"])
        torch.save({"out": out}, target)
    else:
        feats = {**given["feats"], "coords": given["feats"]["coords"].repeat_interleave(given["multiplicity"], 0)}
        out = module(**inputs, feats=feats, multiplicity=given["multiplicity"], steps=None)
        (out * given["weight"]).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        torch.save({"out": out.detach(), "grads": grads | {name: x.grad for name, x in inputs.items()}}, target)
    assert next(normals, None) is None, "the package drew less than it was given"


main(*sys.argv[1:])
