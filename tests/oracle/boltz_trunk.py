"""Run the stock Boltz-2 trunk on given weights and features; needs only the ``boltz`` package.

    python boltz_trunk.py IN.pt OUT.pt

IN.pt holds ``sizes``, ``state`` (Boltz-2 names), ``feats`` (in the package's dense forms), ``weight`` and
``recycling_steps``; OUT.pt gets ``s``, ``z``, ``pdistogram``, ``loss`` and ``grads``.
"""

import sys

import torch
from boltz.model.layers.pairformer import PairformerModule
from boltz.model.loss.distogramv2 import distogram_loss
from boltz.model.modules.encodersv2 import RelativePositionEncoder
from boltz.model.modules.trunkv2 import ContactConditioning, DistogramModule, InputEmbedder, MSAModule, TemplateV2Module
from torch import nn


class StockTrunk(nn.Module):
    """The trunk part of the package's Boltz2, made of its own modules."""

    def __init__(self, sizes):
        super().__init__()
        s, z = sizes["token_s"], sizes["token_z"]
        self.input_embedder = InputEmbedder(
            token_s=s, token_z=z, atoms_per_window_queries=32, atoms_per_window_keys=128, atom_feature_dim=388,
            add_method_conditioning=True, add_modified_flag=True, add_cyclic_flag=True, add_mol_type_feat=True,
            **sizes["atoms"],
        )  # fmt: skip
        self.s_init = nn.Linear(s, s, bias=False)
        self.z_init_1 = nn.Linear(s, z, bias=False)
        self.z_init_2 = nn.Linear(s, z, bias=False)
        self.rel_pos = RelativePositionEncoder(z, fix_sym_check=True, cyclic_pos_enc=True)
        self.token_bonds = nn.Linear(1, z, bias=False)
        self.token_bonds_type = nn.Embedding(7, z)
        self.contact_conditioning = ContactConditioning(z, 4.0, 20.0)
        self.s_norm, self.z_norm = nn.LayerNorm(s), nn.LayerNorm(z)
        self.s_recycle, self.z_recycle = nn.Linear(s, s, bias=False), nn.Linear(z, z, bias=False)
        self.template_module = TemplateV2Module(z, **sizes["template"])
        self.msa_module = MSAModule(token_z=z, token_s=s, **sizes["msa"])
        self.pairformer_module = PairformerModule(s, z, v2=True, **sizes["pairformer"])
        self.distogram_module = DistogramModule(z, sizes["num_bins"])

    def forward(self, feats, recycling_steps):
        s_inputs = self.input_embedder(feats)
        s_init = self.s_init(s_inputs)
        z_init = self.z_init_1(s_inputs)[:, :, None] + self.z_init_2(s_inputs)[:, None]
        z_init = z_init + self.rel_pos(feats) + self.token_bonds(feats["token_bonds"])
        z_init = z_init + self.token_bonds_type(feats["type_bonds"]) + self.contact_conditioning(feats)
        s, z = torch.zeros_like(s_init), torch.zeros_like(z_init)
        mask = feats["token_pad_mask"]
        pair_mask = mask[:, :, None] * mask[:, None]
        for cycle in range(recycling_steps + 1):
            with torch.set_grad_enabled(cycle == recycling_steps):
                s = s_init + self.s_recycle(self.s_norm(s))
                z = z_init + self.z_recycle(self.z_norm(z))
                z = z + self.template_module(z, feats, pair_mask)
                z = z + self.msa_module(z, s_inputs, feats)
                s, z = self.pairformer_module(s, z, mask=mask, pair_mask=pair_mask)
        return s, z, self.distogram_module(z)


def main(source, target):
    given = torch.load(source, weights_only=True)
    torch.Tensor.float = torch.Tensor.double  # the package casts to fp32 in many places; the comparison is in fp64
    torch.set_default_dtype(torch.float64)
    trunk = StockTrunk(given["sizes"]).double().train()
    trunk.load_state_dict(given["state"], strict=True)
    results = {"s": [], "z": [], "pdistogram": [], "loss": []}
    for i, weight in enumerate(given["weight"]):
        # One sample at a time: the package's relative positions are right for a batch of one only.
        feats = {name: x[i : i + 1] for name, x in given["feats"].items()}
        s, z, pdistogram = trunk(feats, given["recycling_steps"])
        loss = distogram_loss({"pdistogram": pdistogram}, feats)[1]
        (loss.sum() + (s[0] * weight).sum()).backward()
        for name, x in (("s", s), ("z", z), ("pdistogram", pdistogram), ("loss", loss)):
            results[name].append(x.detach())
    grads = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    torch.save({**{name: torch.cat(x) for name, x in results.items()}, "grads": grads}, target)


main(*sys.argv[1:])
