"""Diffusion gives the same on any grid as on 1x1: training forward and backward, and sampling, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpfold_train.model.config import DiffusionConfig, MemoryConfig
from cpfold_train.model.edm import noise_levels, placements, randomly_placed
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.atoms import atom_features
from cpfold_train.testing.diffusion_cases import (
    DIFFUSION,
    INPUTS,
    RECOMPUTED,
    B,
    M,
    diffusion,
    draws,
    features,
    trained,
)
from tests.parity import TOTALS, check_case, cut, join, pad, randomise, real

GRIDS = {
    "pair conditioning": [(2, 3)],
    "diffusion, recomputed": [(1, 2), (3, 1), (2, 3)],
    "diffusion, kept": [(1, 2)],
}


@pytest.mark.parametrize(
    ("case", "grid"),
    [(case, grid) for case in DIFFUSION for grid in GRIDS[case]]
    + [pytest.param("diffusion, recomputed", (3, 3), marks=pytest.mark.slow)],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}x{value[1]}",
)
def test_grid_parity(ranks, case, grid):
    check_case(ranks, *grid, DIFFUSION[case])


def gradients(cp, memory: MemoryConfig) -> list[Tensor]:
    """Denoised coordinates, and gradients of inputs and weights."""
    x = {name: cut(pad(x, placement, cp.grid), placement, cp.grid) for name, (x, placement) in INPUTS.items()}
    x = {name: value.clone().requires_grad_() for name, value in x.items()}
    module = diffusion(memory)
    randomise(module)
    denoised = trained(module, x, cp)
    denoised.square().sum().backward()
    return [denoised.detach(), *(value.grad for value in (*x.values(), *module.parameters()))]


def test_samples_in_groups(ranks):
    for found, expected in zip(
        ranks.run(gradients, 1, 2, MemoryConfig(samples_at_once=2)), ranks.run(gradients, 1, 2, RECOMPUTED)
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def sampled(cp) -> Tensor:
    """Three samples of each complex in four steps."""
    x = {name: cut(pad(x, placement, cp.grid), placement, cp.grid) for name, (x, placement) in INPUTS.items()}
    module = diffusion()
    randomise(module)
    feats = features(cp.grid, x["coords"])
    conditioning = module.diffusion_conditioning(x["s_trunk"], x["z"], x["rel_pos"], feats, cp)
    return module.structure_module.sample(x["s_inputs"], x["s_trunk"], feats, conditioning, 4, M, draws(), cp)


@pytest.mark.parametrize(
    "shape", [(2, 3), pytest.param((3, 3), marks=pytest.mark.slow)], ids=lambda g: f"{g[0]}x{g[1]}"
)
def test_sampling_is_the_same_on_any_grid(ranks, shape):
    (serial,) = ranks.run(sampled, 1, 1)
    expected = real(serial, "atom")
    found = real(join(ranks.run(sampled, *shape), "atom", Grid(*shape), partial=False), "atom")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # Samples of the same complex differ, and so do complexes.
    assert all(not torch.allclose(expected[i], expected[j]) for i in range(B * M) for j in range(i))


def test_noise_levels_fall_from_the_highest_to_zero():
    levels = noise_levels(DiffusionConfig(), 200)
    assert len(levels) == 201 and sorted(levels, reverse=True) == levels
    assert levels[0] == pytest.approx(16 * 160) and levels[-2] == pytest.approx(16 * 0.0001) and levels[-1] == 0


def placed(cp) -> tuple[Tensor, Tensor]:
    """The true structure and how it is placed, of this rank's atoms in many samples."""
    coords = cut(pad(INPUTS["coords"][0], "atom", cp.grid), "atom", cp.grid).repeat_interleave(50, 0)
    mask = atom_features(cp.grid)["atom_pad_mask"].repeat_interleave(50, 0)
    return coords, randomly_placed(coords, mask, *placements(draws().copies(50), coords.dtype), cp)


def test_structures_are_centred_and_turned_but_not_mirrored(ranks):
    ((coords, found),) = ranks.run(placed, 1, 1)
    coords, found = real(coords, "atom"), real(found, "atom")
    middles = torch.stack([x.sum(0) / total for x, total in zip(found, torch.tensor(TOTALS).repeat_interleave(50))])
    assert middles.std() == pytest.approx(1, abs=0.15) and middles.abs().max() < 5
    corners = [x[:, 1:4] - x[:, :1] for x in (coords, found)]
    torch.testing.assert_close(corners[0] @ corners[0].mT, corners[1] @ corners[1].mT)
    torch.testing.assert_close(*(torch.linalg.det(x) for x in corners))
    turned = corners[1] / torch.linalg.vector_norm(corners[1], dim=-1, keepdim=True)
    assert turned.mean(0).abs().max() < 0.25, "some directions are likelier than others"
