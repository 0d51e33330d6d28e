"""The smooth lDDT's kernel, run by Triton's interpreter, against the torch form in fp64: sums, pairs and gradient."""

from __future__ import annotations

import pytest
import torch

from cpfold_train.kernels.smooth_lddt import smooth_lddt
from cpfold_train.losses.smooth_lddt import _SmoothLDDT, smooth_lddt_loss

pytest.importorskip("triton")

B, M, ATOMS = 2, 2, 44
"""Three blocks of 16 rows and two of 32 columns, the last ones not full."""


def structures() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions (B M, A, 3), two atoms of them in one place, and truths with reach (B, A, 4), a string of atoms that
    reach 0, 15 and 30 Angstrom."""
    generator = torch.Generator().manual_seed(0)
    coords = torch.randn(B, ATOMS, 3, generator=generator).cumsum(1) * 1.5
    reach = torch.tensor([0.0, 15.0, 30.0])[torch.randint(3, (B, ATOMS, 1), generator=generator)]
    pred = coords.repeat_interleave(M, 0) + torch.randn(B * M, ATOMS, 3, generator=generator)
    pred[:, 11] = pred[:, 10]
    return pred, torch.cat([coords, reach], 2)


def gradient(function, pred: torch.Tensor, truth: torch.Tensor, first: int, step: int) -> list[torch.Tensor]:
    """Sums, pairs, and the gradient of sums that weigh differently."""
    pred = pred.clone().requires_grad_()
    sums, pairs = function(pred, truth, first, step)[:2]
    assert sums.requires_grad and not pairs.requires_grad
    (sums * torch.arange(1, B * M + 1)).sum().backward()
    return [x.double() for x in (sums.detach(), pairs, pred.grad)]


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 3)])
def test_equals_the_torch_form(first, step):
    pred, truth = structures()
    found = gradient(smooth_lddt, pred, truth, first, step)
    expected = gradient(_SmoothLDDT.apply, pred.double(), truth.double(), first, step)
    assert torch.equal(found[1], expected[1]) and (expected[1] > 100).all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert (found[2] - expected[2]).norm() / expected[2].norm() < 1e-6


def loss(cp, kernels: str) -> list[torch.Tensor]:
    """This rank's part of the loss, with an unresolved atom, and of its gradient."""
    pred, truth = structures()
    own = slice(*cp.grid.atoms(ATOMS))
    feats = {
        "coords": truth[:, own, :3],
        "atom_resolved_mask": torch.ones(B, ATOMS)[:, own],
        "atom_to_token": (torch.arange(ATOMS) // 22).expand(B, -1)[:, own],
        "mol_type": torch.tensor([[0, 1]]).expand(B, -1),
    }
    feats["atom_resolved_mask"][:, 3] = 0
    pred = pred[:, own].clone().requires_grad_()
    before, cp.kernels = cp.kernels, kernels
    try:
        shares = smooth_lddt_loss(pred, feats, cp)
    finally:
        cp.kernels = before
    shares.sum().backward()
    return [shares.detach(), pred.grad]


def test_the_loss_by_both_forms(ranks):
    """Shares of the ranks differ from one another, and each is the same either way."""
    for found, expected in zip(ranks.run(loss, 1, 2, "triton"), ranks.run(loss, 1, 2, "torch")):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
