"""Losses of structures and confidences: against the stock package, and grid against grid."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfold_train.cli.bench import boltz_python
from cpfold_train.losses.bfactor import bfactor_loss
from cpfold_train.losses.confidence import confidence_targets, pae_loss, pde_loss, plddt_loss, resolved_loss
from cpfold_train.losses.diffusion import diffusion_loss
from cpfold_train.losses.smooth_lddt import smooth_lddt_loss
from cpfold_train.model.frames import token_frames
from cpfold_train.parallel.grid import Grid
from tests import complexes
from tests.complexes import SAMPLES

ORACLE = Path(__file__).parent / "oracle" / "boltz_losses.py"
SIGMA_DATA = 16.0
"""Of the stock package's configuration."""
SHAPES = [(1, 1), (2, 3), pytest.param((3, 3), marks=pytest.mark.slow)]
USES = {"diffusion": "pred_coords", "smooth_lddt": "pred_coords"}
"""What a loss has a gradient of, if not of logits of its own name."""


def one_loss(name, feats, given, cp):
    """This rank's part, (B*M,) or (B,)."""
    if name == "diffusion":
        return diffusion_loss(given["pred_coords"], given["turned_coords"], given["sigmas"], feats, cp, SIGMA_DATA)
    if name == "smooth_lddt":
        return smooth_lddt_loss(given["pred_coords"], feats, cp)
    if name == "bfactor":
        return bfactor_loss(given["bfactor"], feats, cp)
    targets = confidence_targets(given["pred_coords"], given["true_coords"], given["true_resolved"], cp)
    loss = {"plddt": plddt_loss, "resolved": resolved_loss, "pde": pde_loss, "pae": pae_loss}[name]
    return loss(given[name], targets, feats, cp)


def losses_and_gradients(cp, feats, given):
    """Shares of the losses, and of the gradients of their sums with weights that differ from sample to sample."""
    feats, given = complexes.cut(feats, given, cp.grid)
    found = {}
    for name in USES | complexes.LOGITS:
        leaf = given[USES.get(name, name)].requires_grad_()
        losses = one_loss(name, feats, given, cp)
        weights = torch.arange(1, len(losses) + 1)
        (grad,) = torch.autograd.grad((losses * weights).sum(), leaf)
        found[name] = losses.detach(), grad
        leaf.requires_grad_(False)
    return found


def on_grid(ranks, shape, feats, given):
    """Losses and gradients by name, summed and joined over the ranks."""
    grid = Grid(*shape)
    parts = ranks.run(losses_and_gradients, *shape, feats, given)
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
    found = on_grid(ranks, shape, *complexes.batch(Grid(*shape)))
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


def test_each_sample_has_its_own_truth(ranks):
    """Of confidences: permuted chains, other atoms resolved, those of ligands too. 2x3 and 1x1 agree."""
    both = []
    for shape in ((1, 1), (2, 3)):
        feats, given = complexes.batch(Grid(2, 3))
        generator = torch.Generator().manual_seed(4)
        kept = torch.rand(given["true_resolved"].shape, generator=generator) > 0.2
        given["true_resolved"] *= kept
        given["true_coords"] += torch.randn((*kept.shape, 3), generator=generator, dtype=torch.float64)
        both.append(on_grid(ranks, shape, feats, given))
    for name, (losses, grad) in both[0].items():
        for actual, expected in zip(both[1][name], (losses, grad)):
            torch.testing.assert_close(
                actual, expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert len(losses) == 2 or losses.unique().numel() == len(losses)


def test_smooth_lddt_equals_all_pairs(ranks):
    """Against the definition over all A x A pairs, and autograd."""
    feats, given = complexes.batch(Grid())
    ours = on_grid(ranks, (1, 1), feats, given)["smooth_lddt"]
    pred = given["pred_coords"].requires_grad_()
    nucleic = feats["mol_type"].gather(1, feats["atom_to_token"].long()) % 3 > 0
    known = feats["atom_resolved_mask"] > 0
    distance = (feats["coords"][:, :, None] - feats["coords"][:, None]).norm(dim=-1)
    near = (distance < torch.where(nucleic, 30.0, 15.0)[..., None]) & known[..., None] & known[:, None]
    near &= ~torch.eye(known.shape[1], dtype=torch.bool)
    near, distance = (x.double().repeat_interleave(SAMPLES, 0) for x in (near, distance))
    error = (distance - (pred[:, :, None] - pred[:, None] + 1e-6).norm(dim=-1)).abs()
    score = sum(torch.sigmoid(threshold - error) for threshold in (0.5, 1, 2, 4)) / 4
    losses = 1 - (score * near).sum((1, 2)) / (near.sum((1, 2)) + 1e-5)
    weights = torch.arange(1, len(losses) + 1)
    (grad,) = torch.autograd.grad((losses * weights).sum(), pred)
    torch.testing.assert_close(ours, (losses.detach(), grad), rtol=1e-9, atol=1e-12)


def test_nothing_resolved(ranks):
    """A sample without coordinates has finite losses, and no gradient but that of what the heads say of it."""
    feats, given = complexes.batch(Grid())
    for x in (*(feats[name] for name in ("coords", "atom_resolved_mask", "bfactor")), given["true_coords"]):
        x.zero_()
    given["true_resolved"].zero_()
    for name, (losses, grad) in on_grid(ranks, (1, 1), feats, given).items():
        assert losses.isfinite().all() and grad.isfinite().all(), name
        assert name == "resolved" or not grad.any(), name


def test_partners_are_resolved_in_the_truth_at_hand(ranks):
    """Where no residue's centre is resolved, representative atoms have no partners, whatever the features say."""
    feats, given = complexes.batch(Grid())
    centre = feats["token_to_center_atom"].repeat_interleave(SAMPLES, 0).long()
    given["true_resolved"].scatter_(1, centre, 0.0)
    found = on_grid(ranks, (1, 1), feats, given)
    assert not found["plddt"][0].any() and found["pde"][0].any()


def frames(cp, coords, resolved, feats):
    """Atoms of the tokens' frames."""
    return token_frames(coords, resolved, feats, cp, "test")


def test_frames_of_ligands_go_by_resolved_atoms(ranks):
    """They are those that the data has for the truth, though a third of the ligand is unresolved."""
    crop = complexes.crops()[1]
    structure = crop.structure
    resolved = structure.resolved & (np.random.default_rng(0).random(len(structure.resolved)) > 0.3)
    structure = replace(structure, resolved=resolved, coords=structure.coords * resolved[:, None])
    found = complexes.features_alone(replace(crop, structure=structure))
    feats = {name: torch.from_numpy(x)[None] for name, x in found.items()}
    shown = feats["frame_resolved_mask"] > 0
    assert (shown & (feats["mol_type"] == 3)).sum() > 9
    given = {name: x if name != "frames_idx" else x * (feats["mol_type"] != 3)[..., None] for name, x in feats.items()}
    (index,) = ranks.run(frames, 1, 1, feats["coords"], feats["atom_resolved_mask"], given)
    assert (index == feats["frames_idx"])[shown].all()
