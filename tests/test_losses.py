"""Losses of structures and confidences: against the stock package, and grid against grid."""

import subprocess
from pathlib import Path

import pytest
import torch

from cpfold_train.bench.command import boltz_python
from cpfold_train.losses.bfactor import bfactor_loss
from cpfold_train.losses.confidence import judge, pae_loss, pde_loss, plddt_loss, resolved_loss
from cpfold_train.losses.diffusion import diffusion_loss
from cpfold_train.losses.smooth_lddt import smooth_lddt_loss
from cpfold_train.parallel.grid import Grid
from tests import complexes
from tests.complexes import SAMPLES

ORACLE = Path(__file__).parent / "oracle" / "boltz_losses.py"
SHAPES = [(1, 1), (2, 3), (3, 3)]
USES = {"diffusion": "pred_coords", "smooth_lddt": "pred_coords"}
"""What a loss has a gradient of, if not of logits of its own name."""


def all_losses(feats, given, cp):
    """This rank's share of every loss by name, (B*M,) or (B,)."""
    truth, resolved = (feats[name].repeat_interleave(SAMPLES, 0) for name in ("coords", "atom_resolved_mask"))
    judged = judge(given["pred_coords"], truth, resolved, cp)
    heads = {"plddt": plddt_loss, "resolved": resolved_loss, "pde": pde_loss, "pae": pae_loss}
    return {
        "diffusion": diffusion_loss(given["pred_coords"], given["turned_coords"], given["sigmas"], feats, cp),
        "smooth_lddt": smooth_lddt_loss(given["pred_coords"], feats, cp),
        "bfactor": bfactor_loss(given["bfactor"], feats, cp),
        **{name: loss(given[name], judged, feats, cp) for name, loss in heads.items()},
    }


def losses_and_gradients(cp, feats, given):
    """Shares of the losses, and of the gradients of their sums with weights that differ from sample to sample."""
    feats, given = complexes.cut(feats, given, cp.grid)
    found = {}
    for name in USES | complexes.LOGITS:
        leaf = given[USES.get(name, name)].requires_grad_()
        losses = all_losses(feats, given, cp)[name]
        weights = torch.arange(1, len(losses) + 1)
        (grad,) = torch.autograd.grad((losses * weights).sum(), leaf)
        found[name] = losses.detach(), grad
        leaf.requires_grad_(False)
    return found


def on_grid(ranks, shape):
    """Losses and gradients by name, summed and joined over the ranks."""
    grid = Grid(*shape)
    parts = ranks.run(losses_and_gradients, *shape, *complexes.batch(grid))
    joined = {}
    for name in parts[0]:
        losses, grads = zip(*(part[name] for part in parts))
        joined[name] = sum(losses), complexes.join(list(grads), USES.get(name, name), grid)
    return joined


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """What the package computes of each crop alone."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    folder, samples = tmp_path_factory.mktemp("losses"), []
    for crop, given in zip(complexes.crops(), complexes.predictions()):
        feats = {name: torch.from_numpy(x)[None] for name, x in complexes.features_alone(crop).items()}
        feats = {name: x.double() if x.is_floating_point() else x for name, x in feats.items()}
        samples.append({"feats": feats, "given": given})
    torch.save(samples, folder / "in.pt")
    subprocess.run([python, str(ORACLE), str(folder / "in.pt"), str(folder / "out.pt")], check=True)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_losses_equal_the_package(ranks, oracle, shape):
    """The package takes means over diffusion samples, so its gradients have their number below the line."""
    found = on_grid(ranks, shape)
    assert found.keys() == oracle[0].keys()
    for name, (losses, grad) in found.items():
        samples = len(losses) // len(oracle)
        weights = torch.arange(1, len(losses) + 1)
        for b, expected in enumerate(oracle):
            own = slice(b * samples, (b + 1) * samples)
            loss, wanted = expected[name]

            def close(actual, expected, name=name):
                torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}")

            close(losses[own].mean(), loss)
            part = grad[own] / (samples * weights[own]).view(-1, *[1] * (grad.ndim - 1))
            real, scale = tuple(map(slice, wanted.shape)), wanted.abs().max()
            assert scale > 0
            close(part[real] / scale, wanted / scale)
            part[real] = 0
            assert not part.any(), f"{name}: padding has a gradient"
