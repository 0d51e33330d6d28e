"""Diffusion against the stock ``boltz`` package: same weights, features and draws, fp64, training step and sampling."""

from __future__ import annotations

import subprocess
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cpfold_train.cli.bench import boltz_python
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.diffusion_cases import (
    ATOMS,
    CONFIG,
    INPUTS,
    TOKEN_S,
    TOKEN_Z,
    A,
    B,
    M,
    diffusion,
    draws,
    features,
)
from tests.atoms import dense
from tests.parity import TOTALS, cut, join, pad, randomise, real

ORACLE = Path(__file__).parent / "oracle" / "boltz_diffusion.py"
OF_ONE = RandomStreams(torch.arange(1) + 5)
"""Draws of the first complex."""
LAYERS = ("token_transformer_depth", "token_transformer_heads", "conditioning_transition_layers", "dim_fourier")
NAMES = ("s_inputs", "s_trunk", "z", "rel_pos")
STEPS = 4


def module():
    made = diffusion()
    randomise(made)
    return made


def values(grid: Grid) -> dict[str, Tensor]:
    """A rank's part of all inputs."""
    return {name: cut(pad(x, placement, grid), placement, grid).clone() for name, (x, placement) in INPUTS.items()}


def weight(grid: Grid) -> Tensor:
    """How much each denoised coordinate counts, padded atoms not at all: a rank's part."""
    whole = torch.randn(B * M, A, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return cut(pad(real(pad(whole, "atom", Grid()), "atom"), "atom", grid), "atom", grid)


def our_step(cp):
    """Denoised coordinates and partial gradients of this rank."""
    ours, x = module(), values(cp.grid)
    inputs = {name: x[name].requires_grad_() for name in NAMES}
    feats = features(cp.grid, x["coords"])
    conditioning = ours.diffusion_conditioning(x["s_trunk"], x["z"], x["rel_pos"], feats, cp)
    out = ours.structure_module(x["s_inputs"], x["s_trunk"], feats, conditioning, M, draws(), cp)
    (out["denoised_atom_coords"] * weight(cp.grid)).sum().backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    return out["denoised_atom_coords"].detach(), grads, {name: value.grad for name, value in inputs.items()}


def full(feats: dict[str, Tensor]) -> dict[str, Tensor]:
    """One complex without padded atoms: the package centres on all atoms that it samples, padded ones included."""
    one = {name: deepcopy(x[:1]) for name, x in feats.items()}
    one["atom_to_token"][:, TOTALS[0] :] = len(one["token_pad_mask"][0]) - 1
    one["token_atom_start"][:, -1] = one["atom_pad_mask"].shape[1]
    one["atoms_per_token"] = torch.from_numpy(np.diff(one["token_atom_start"]))
    one["atom_pad_mask"][:] = 1
    return one


def our_sample(cp):
    ours, x = module(), {name: value[:1] for name, value in values(cp.grid).items()}
    feats = full(features(cp.grid, values(cp.grid)["coords"]))
    conditioning = ours.diffusion_conditioning(x["s_trunk"], x["z"], x["rel_pos"], feats, cp)
    return ours.structure_module.sample(x["s_inputs"], x["s_trunk"], feats, conditioning, STEPS, M, OF_ONE, cp)


def placements_and_noise(samples: RandomStreams, atoms: int) -> list[Tensor]:
    """What one random placement and the noise after it draw, in the package's order."""
    sizes = {"rotation": 4, "translation": 3, "noise": 3 * atoms}
    return [samples.at(site).normal(0, size).double() for site, size in sizes.items()]


def stock(folder: Path, **given) -> dict:
    """What the package computes."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    sizes = {"token_s": TOKEN_S, "token_z": TOKEN_Z, **asdict(ATOMS)}
    sizes |= {name: getattr(CONFIG, name) for name in LAYERS}
    process = {name: value for name, value in asdict(CONFIG).items() if name not in LAYERS}
    given |= {"sizes": sizes, "process": process, "state": module().state_dict(), "multiplicity": M, "steps": STEPS}
    torch.save(given, folder / "in.pt")
    subprocess.run([python, str(ORACLE), str(folder / "in.pt"), str(folder / "out.pt")], check=True)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def stock_step(tmp_path_factory):
    x = values(Grid())
    feats = features(Grid(), x.pop("coords"))
    samples = draws().copies(M)
    normals = [samples.at("sigma").normal(0, 1).double()]
    normals += placements_and_noise(samples, feats["atom_pad_mask"].shape[1])
    made = {name: feats[name] for name in ("token_pad_mask", "coords")}
    return stock(
        tmp_path_factory.mktemp("oracle"), feats=dense(feats) | made, inputs=x, normals=normals, weight=weight(Grid())
    )


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_training_step_equals_the_package(ranks, stock_step, shape):
    grid, parts = Grid(*shape), ranks.run(our_step, *shape)
    out = join([part[0] for part in parts], "atom", grid, partial=False)
    torch.testing.assert_close(real(out, "atom"), real(stock_step["out"], "atom"), rtol=1e-8, atol=1e-8)
    placed = {name: INPUTS[name][1] for name in NAMES}
    totals = {name: join([part[2][name] for part in parts], placed[name], grid, partial=True) for name in NAMES}
    totals = {name: real(total, placed[name]) for name, total in totals.items()}
    totals |= {name: sum(part[1][name] for part in parts) for name in parts[0][1]}
    assert totals.keys() == stock_step["grads"].keys() and len(totals) > 100
    for name, total in totals.items():
        expected = stock_step["grads"][name]
        expected = real(expected, placed[name]) if name in placed else expected
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            total / scale, expected / scale, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected.any(), f"the gradient of {name} is zero: the test cannot fail"


def test_sampling_equals_the_package(ranks, tmp_path):
    (ours,) = ranks.run(our_sample, 1, 1)
    feats = full(features(Grid(), values(Grid())["coords"]))
    samples, atoms = OF_ONE.copies(M), feats["atom_pad_mask"].shape[1]
    normals = [samples.at("start").at("noise").normal(0, 3 * atoms).double()]
    for step in range(STEPS):
        normals += placements_and_noise(samples.at("step", step), atoms)
    x = {name: values(Grid())[name][:1] for name in NAMES}
    feats = dense(feats) | {"token_pad_mask": feats["token_pad_mask"]}
    found = stock(tmp_path, feats=feats, inputs=x, normals=normals, weight=None)
    torch.testing.assert_close(ours, found["out"], rtol=1e-7, atol=1e-7)
