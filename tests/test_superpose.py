"""Superpositions from sums of moments."""

import pytest
import torch

from cpfold_train.ops.superpose import least_squares, moments, squared_distances, superposition


@pytest.mark.parametrize("mirrored", [False, True])
def test_motion_is_the_best_and_never_a_mirror(mirrored):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5.0, 2.0]) + 30
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    turn = turn * torch.linalg.det(turn) * (-1 if mirrored else 1)
    p = x @ turn.mT - 4 + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    sums = moments(p, x).sum(0)
    rotation, shift = superposition(sums)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    least = (x @ rotation.mT + shift - p).square().sum()
    assert (least < 3) != mirrored
    torch.testing.assert_close(least_squares(sums), least, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(squared_distances(sums, rotation, shift), least, rtol=1e-9, atol=1e-7)
    for _ in range(20):
        turn = 0.3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        other = rotation @ torch.linalg.matrix_exp(turn - turn.mT)
        assert (x @ other.mT + p.mean(0) - x.mean(0) @ other.mT - p).square().sum() >= least
