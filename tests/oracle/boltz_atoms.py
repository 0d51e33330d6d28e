"""Run the stock Boltz-2 atom encoder and decoder on given weights and features; needs only the ``boltz`` package.

    python boltz_atoms.py IN.pt OUT.pt

IN.pt holds ``sizes``, ``state`` (Boltz-2 names), ``feats`` (in the package's dense forms), ``inputs`` (``s_trunk``,
``z``, ``r``), ``multiplicity`` and ``weights`` (of the outputs ``a`` and ``r_update`` in the loss); OUT.pt gets the two
outputs and ``grads``.
"""

import sys

import torch
from boltz.model.modules.encodersv2 import AtomAttentionDecoder, AtomAttentionEncoder, AtomEncoder
from torch import nn


class StockAtoms(nn.Module):
    """What the diffusion module does with atoms, without the transformer of tokens in between."""

    def __init__(self, atom_s, atom_z, token_s, token_z, depth, heads):
        super().__init__()
        self.atom_encoder = AtomEncoder(atom_s, atom_z, token_s, token_z, 32, 128, 388)
        self.proj_enc = nn.Sequential(nn.LayerNorm(atom_z), nn.Linear(atom_z, depth * heads, bias=False))
        self.proj_dec = nn.Sequential(nn.LayerNorm(atom_z), nn.Linear(atom_z, depth * heads, bias=False))
        self.atom_attention_encoder = AtomAttentionEncoder(atom_s, token_s, 32, 128, depth, heads)
        self.atom_attention_decoder = AtomAttentionDecoder(atom_s, token_s, 32, 128, depth, heads)

    def forward(self, feats, s_trunk, z, r, multiplicity):
        q, c, p, to_keys = self.atom_encoder(feats, s_trunk, z)
        a, q, c, _ = self.atom_attention_encoder(feats, q, c, self.proj_enc(p), to_keys, r, multiplicity)
        return a, self.atom_attention_decoder(a, q, c, self.proj_dec(p), feats, to_keys, multiplicity)


def main(source, target):
    given = torch.load(source, weights_only=True)
    torch.Tensor.float = torch.Tensor.double  # the package casts to fp32 in many places; the comparison is in fp64
    torch.set_default_dtype(torch.float64)
    module = StockAtoms(**given["sizes"]).double().train()
    module.load_state_dict(given["state"], strict=True)
    inputs = {name: x.requires_grad_() for name, x in given["inputs"].items()}
    a, r_update = module(given["feats"], **inputs, multiplicity=given["multiplicity"])
    ((a * given["weights"]["a"]).sum() + (r_update * given["weights"]["r_update"]).sum()).backward()
    grads = {name: p.grad for name, p in module.named_parameters()} | {name: x.grad for name, x in inputs.items()}
    torch.save({"a": a.detach(), "r_update": r_update.detach(), "grads": grads}, target)


main(*sys.argv[1:])
