"""Run the stock confidence and b-factor modules on given weights and inputs; needs only the ``boltz`` package.

    python boltz_confidence.py IN.pt OUT.pt

IN.pt holds ``args`` of the module, ``bfactor_bins``, ``state``, ``multiplicity`` and ``samples``, each a batch of one
complex: ``feats`` (in the package's dense forms), ``s_inputs``, ``s``, ``z``, ``x``, ``pdistogram`` and ``weights`` of
the loss. OUT.pt gets ``grads`` and, for each complex, ``out`` and the gradients of its ``inputs``.
"""

import sys

import torch
from boltz.model.modules.confidencev2 import ConfidenceModule
from boltz.model.modules.trunkv2 import BFactorModule


def main(source, target):
    given = torch.load(source, weights_only=True)
    torch.Tensor.float = torch.Tensor.double  # the package casts to fp32 in many places; the comparison is in fp64
    torch.set_default_dtype(torch.float64)
    modules = torch.nn.ModuleDict(
        {
            "confidence_module": ConfidenceModule(**given["args"]),
            "bfactor_module": BFactorModule(given["args"]["token_s"], given["bfactor_bins"]),
        }
    ).double()
    modules.load_state_dict(given["state"], strict=True)
    modules.eval()
    results = []
    for sample in given["samples"]:
        inputs = {name: sample[name].requires_grad_() for name in ("s_inputs", "s", "z")}
        out = modules["confidence_module"](
            **inputs,
            x_pred=sample["x"],
            feats=sample["feats"],
            pred_distogram_logits=sample["pdistogram"][:, :, :, 0],
            multiplicity=given["multiplicity"],
        )
        out["pbfactor"] = modules["bfactor_module"](inputs["s"]).repeat_interleave(given["multiplicity"], 0)
        loss = sum((out[name] * weight).sum() for name, weight in sample["weights"].items())
        loss.backward()
        out["pair_chains_iptm"] = torch.stack(
            [
                torch.stack([x for _, x in sorted(row.items())], -1)
                for _, row in sorted(out["pair_chains_iptm"].items())
            ],
            -2,
        )
        results.append(
            {
                "out": {name: x.detach() for name, x in out.items()},
                "inputs": {name: x.grad for name, x in inputs.items()},
            }
        )
    grads = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    torch.save({"samples": results, "grads": grads}, target)


main(*sys.argv[1:])
