"""Superpositions from sums of moments."""

import pytest
import torch

from cpfold_train.ops.quaternions import rotation_of_most_overlap
from cpfold_train.ops.superpose import best_rotation, least_squares, moments, rigid_motion, squared_distances


@pytest.mark.parametrize("mirrored", [False, True])
def test_motion_is_the_best_and_never_a_mirror(mirrored):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5.0, 2.0]) + 30
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    turn = turn * torch.linalg.det(turn) * (-1 if mirrored else 1)
    p = x @ turn.mT - 4 + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    sums = moments(p, x).sum(0)
    rotation, shift = rigid_motion(sums)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    least = (x @ rotation.mT + shift - p).square().sum()
    assert (least < 3) != mirrored
    torch.testing.assert_close(least_squares(sums), least, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(squared_distances(sums, rotation, shift), least, rtol=1e-9, atol=1e-7)
    for _ in range(20):
        turn = 0.3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        other = rotation @ torch.linalg.matrix_exp(turn - turn.mT)
        assert (x @ other.mT + p.mean(0) - x.mean(0) @ other.mT - p).square().sum() >= least


def test_rotations_on_a_gpu_are_those_of_singular_values():
    """Of structures, of nearly flat and nearly straight ones, of mirror images; and one of the best where several are:
    of points on a line, of one point, of no overlap at all."""
    generator = torch.Generator().manual_seed(1)
    covariance = torch.randn(400, 3, 3, generator=generator, dtype=torch.float64) * 1e5
    covariance[100:200] *= torch.tensor([1, 1e-2, 1e-5], dtype=torch.float64)[:, None]
    covariance[200] = 7 * torch.eye(3)
    unique, several = covariance, torch.zeros(4, 3, 3, dtype=torch.float64)
    several[0, 0, 0], several[1, 0, 1], several[2] = 7, -7, torch.diag(torch.tensor([5.0, 5, -5]))
    for given in (unique, several):
        rotation = rotation_of_most_overlap(given)
        expected, overlap = best_rotation(given)
        size = torch.linalg.matrix_norm(given).clamp(min=1)
        torch.testing.assert_close((rotation * given).sum((1, 2)) / size, overlap / size, rtol=0, atol=1e-14)
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand_as(rotation))
        assert (torch.linalg.det(rotation) > 0).all()
        if given is unique:
            assert (torch.linalg.det(given) < 0).any()
            torch.testing.assert_close(rotation, expected, rtol=0, atol=1e-9)
    assert torch.equal(rotation[3], torch.eye(3).double())
