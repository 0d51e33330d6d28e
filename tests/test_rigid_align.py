"""Laying a structure onto another: the best rotation and translation, whatever the grid."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.ops.rigid_align import weighted_rigid_align

B, A = 3, 36


def structures() -> tuple[torch.Tensor, ...]:
    """Two structures that are not alike, weights, and masks of which the last sample's is empty."""
    generator = torch.Generator().manual_seed(0)
    moving = torch.randn(B, A, 3, generator=generator, dtype=torch.float64) * 5 + 20
    target = moving + torch.randn(B, A, 3, generator=generator, dtype=torch.float64) * 2
    # The second sample is the mirror image, so that the best orthogonal matrix is not a rotation.
    target[1, :, 0] *= -1
    target = target @ rotation(generator) + 7
    weights = 1 + 10 * torch.rand(B, A, generator=generator, dtype=torch.float64)
    mask = (torch.rand(B, A, generator=generator) > 0.3).double()
    mask[2] = 0
    return moving, target, weights, mask


def rotation(generator: torch.Generator) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return q * torch.linalg.det(q)


def align(cp, dtype=torch.float64) -> torch.Tensor:
    own = slice(*cp.grid.atoms(A))
    return weighted_rigid_align(*(x[:, own].to(dtype) for x in structures()), cp)


def distances(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x[:, :, None] - x[:, None], dim=-1)


def distance(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights[..., None] * (x - y) ** 2).sum((1, 2))


def test_is_a_rotation_and_no_small_one_is_better(ranks):
    (aligned,) = ranks.run(align, 1, 1)
    moving, target, weights, mask = structures()
    weights = weights * mask
    torch.testing.assert_close(distances(aligned), distances(moving))
    triple = [torch.linalg.det(x[:, 1:4] - x[:, :1]) for x in (aligned, moving)]
    torch.testing.assert_close(*triple)
    torch.testing.assert_close(aligned[2], moving[2])

    best = distance(aligned, target, weights)
    middle = (weights[..., None] * aligned).sum(1, keepdim=True)[:2] / weights.sum(1)[:2, None, None]
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0):
        for _ in range(20):
            skew = torch.randn(3, 3, generator=generator, dtype=torch.float64) * size
            turn = torch.linalg.matrix_exp(skew - skew.mT)
            shift = torch.randn(3, generator=generator, dtype=torch.float64) * size
            other = (aligned[:2] - middle) @ turn + middle + shift
            assert (distance(other, target[:2], weights[:2]) > best[:2]).all()


def test_an_exact_copy_is_met(ranks):
    (aligned,) = ranks.run(align_copy, 1, 1)
    torch.testing.assert_close(aligned, structures()[0])


def align_copy(cp) -> torch.Tensor:
    moving, _, weights, _ = structures()
    away = moving @ rotation(torch.Generator().manual_seed(3)) - 40
    return weighted_rigid_align(away, moving, weights, torch.ones_like(weights), cp)


@pytest.mark.parametrize(
    "grid", [(1, 2), (2, 3), pytest.param((3, 3), marks=pytest.mark.slow)], ids=lambda g: f"{g[0]}x{g[1]}"
)
def test_grids(ranks, grid):
    (expected,) = ranks.run(align, 1, 1)
    torch.testing.assert_close(torch.cat(ranks.run(align, *grid), 1), expected, rtol=1e-11, atol=1e-11)


def test_narrow_coordinates_stay_narrow(ranks):
    (expected,) = ranks.run(align, 1, 1)
    (narrow,) = ranks.run(align, 1, 1, torch.float32)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-5, atol=1e-4)
