"""The whole of Boltz-2 against the stock ``boltz`` package: a training step, and a round trip of weights.

Both sides run their own training step on the case of :mod:`tests.golden.case`. The package gets what ours drew.

Known differences, which are taken out of the comparison:

- the noise levels of the copies of a sample are drawn one by one here; the package can do so, and by default gives all
  of them one level;
- dropout is drawn otherwise, and is off;
- the truth that confidences are measured by is renamed by another search (``tests/test_symmetry.py``): the package is
  given ours;
- aligned errors are taken at the residues that are resolved in the truth as renamed; the package asks for residues
  with a frame in the truth as it came, and a place in the truth of the first structure: in these crops all have;
- the package centres what it samples on all atoms, padded ones included: the crops have whole windows of atoms;
- the package takes one complex at a time. Ours takes both in one batch, so one of them is padded.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpfold_train.__main__ import main
from cpfold_train.checkpoints.boltz import boltz_name, initialise
from cpfold_train.cli.bench import boltz_python
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.context import to_local
from cpfold_train.training.module import CoFoldingModule
from tests.golden.case import (
    CONFIG,
    DRAWN,
    OPTIM,
    SEED,
    VANISHING,
    WEIGHTS,
    crops,
    features,
    our_step,
    weights,
)
from tests.golden.stock import package, package_features, package_trains


def deviations(parts: list[dict], expected: dict) -> dict[str, float]:
    """How far the losses and gradients are from the package's, relative to each loss and to the largest entry of each
    gradient, or of all gradients where one vanishes."""
    assert all(part["grads"].keys() == expected["grads"].keys() for part in parts)
    assert expected["losses"].keys() == parts[0]["losses"].keys()
    largest = max(x.abs().max() for x in expected["grads"].values())
    off = {}
    for kind in ("losses", "grads"):
        for name, x in expected[kind].items():
            vanishes = name.endswith(tuple(VANISHING))
            assert vanishes == bool(x.abs().max() < 1e-7 * largest), f"the gradient of {name} says little"
            apart = (sum(part[kind][name] for part in parts) - x).abs().max()
            off[name] = (apart / (largest if vanishes else x.abs().max())).item()
    return off


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where files are exchanged with the package."""
    if not boltz_python():
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def trained(ranks, folder):
    """What a rank alone computes, and what the package does."""
    alone = ranks.run(our_step, 1, 1, weights(), torch.float64)
    return alone, package_trains(alone[0], folder, torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_training_step_equals_the_package(ranks, trained, shape):
    alone, expected = trained
    parts = alone if shape == (1, 1) else ranks.run(our_step, *shape, weights(), torch.float64)
    off = deviations(parts, expected)
    worst = dict(sorted(off.items(), key=lambda item: -item[1])[:10])
    assert max(off.values()) < 1e-8, worst
    assert len(off) > 500


def our_optimizer_step(cp, stock: Path, run: Path) -> None:
    """Take the package's weights, train one step in fp32 and write a checkpoint as our training does."""
    module = CoFoldingModule(CONFIG, MemoryConfig(), OPTIM, WEIGHTS, DRAWN, SEED)
    initialise(module.model, stock, "raw")
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    optimizer = module.configure_optimizers()["optimizer"]
    module.train().training_step(features(crops(), cp.grid, torch.float32), 0)["loss"].backward()
    optimizer.step()
    hyper = {"model": asdict(CONFIG)}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": hyper, "global_step": 1}, run)


def our_outputs(cp, checkpoint: Path, given: dict) -> dict[str, Tensor]:
    """What the trunk, one denoising and the heads return of the first crop."""
    model = CoFolding(CONFIG, MemoryConfig())
    initialise(model, checkpoint, "raw")
    model, feats = model.double().eval(), features(crops()[:1], cp.grid, torch.float64)
    with torch.no_grad():
        trunk = to_local(model.trunk(feats, cp, 1, None))
        s_inputs, s, z = (trunk[name] for name in ("s_inputs", "s", "z"))
        conditioning = model.diffusion_conditioning(s, z, model.trunk.rel_pos(feats, cp), feats, cp)
        denoised = model.structure_module.denoise(given["noisy"], given["sigmas"], s_inputs, s, feats, conditioning, cp)
        heads = model.predict_confidence(trunk, denoised, feats, cp, None)
        return {**trunk, **heads, "pbfactor": model.bfactor_module(s), "sample_atom_coords": denoised}


def test_round_trip_through_a_step_of_training(ranks, trained, folder):
    """The package's checkpoint, one optimizer step of ours, exported, loaded by the package strictly: same outputs."""
    ranks.run(our_optimizer_step, 1, 1, folder / "stock.ckpt", folder / "own.ckpt")
    assert main(["export-boltz", str(folder / "own.ckpt"), str(folder / "out.ckpt"), "--weights", "raw"]) == 0
    before, after = (torch.load(folder / name, weights_only=False)["state_dict"] for name in ("stock.ckpt", "out.ckpt"))
    assert before.keys() == after.keys()
    still = {name for name, x in before.items() if torch.equal(x, after[name])}
    learned = {boltz_name(name) for name, x in CoFolding(CONFIG, MemoryConfig()).named_parameters() if x.requires_grad}
    assert not {name for name in still & learned if not name.endswith(tuple(VANISHING))}

    feats = package_features(crops()[0], torch.float64)
    sigmas = torch.tensor([0.5, 20.0], dtype=torch.float64)
    noise = torch.randn(2, *feats["ref_pos"].shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = {"noisy": feats["coords"][:, 0] + sigmas[:, None, None] * noise, "sigmas": sigmas}
    torch.save({"feats": feats, "recycling_steps": 1, **given}, folder / "run.pt")
    package("run", folder)
    expected = torch.load(folder / "ran.pt", weights_only=True)
    (found,) = ranks.run(our_outputs, 1, 1, folder / "out.ckpt", given)
    for name, x in expected.items():
        assert (found[name] - x).abs().max() < 1e-10 * x.abs().max(), name
