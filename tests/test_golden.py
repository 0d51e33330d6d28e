"""A training step against golden values of the stock ``boltz`` package: losses, each gradient, and sampled structures.

The values were made by ``tests/golden/make.py`` and need no package; ``tests/test_boltz_whole.py`` compares every
entry of the gradients where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import DNA, NONPOLYMER, PROTEIN
from tests.golden.case import STEPS, STRUCTURES, VANISHING, crops, features, our_step, weights
from tests.golden.make import GOLDEN, summary

CLOSE = 1e-10
"""Largest relative deviation. Where the values were made it is 4e-14; other machines add up in another order."""


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_values_are_of_this_case(golden):
    """What the values cover, so that no mistake in a loss or a module can hide behind a zero."""
    tokens = torch.bincount(features(crops(), Grid(), torch.float64)["mol_type"].flatten(), minlength=4)
    assert min(tokens[kind] for kind in (PROTEIN, DNA, NONPOLYMER)) > 5
    assert len(crops()[0].templates) == 2
    assert (golden["losses"] > 0).all()
    largest = golden["grads"][:, 0].max()
    for name, (norm, *_) in zip(golden["grad_names"].tolist(), golden["grads"]):
        assert (norm > 1e-9 * largest) != name.endswith(tuple(VANISHING)), name
    for b, crop in enumerate(crops()):
        assert golden[f"trajectory_{b}"].shape == (STEPS + 1, STRUCTURES, len(crop.atoms.atom), 3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_training_step_equals_the_golden_values(ranks, golden, shape):
    parts = ranks.run(our_step, *shape, weights(), torch.float64)
    losses = {name: float(sum(part["losses"][name] for part in parts)) for name in parts[0]["losses"]}
    assert losses == pytest.approx(dict(zip(golden["loss_names"].tolist(), golden["losses"])), rel=CLOSE)

    expected = dict(zip(golden["grad_names"].tolist(), torch.from_numpy(golden["grads"])))
    assert all(part["grads"].keys() == expected.keys() for part in parts)
    off, largest = {}, golden["grads"][:, 0].max()
    for name, values in expected.items():
        scale = largest if name.endswith(tuple(VANISHING)) else values[0]
        total = sum(part["grads"][name] for part in parts)
        off[name] = float((summary(name, total) - values).abs().max() / scale)
    worst = dict(sorted(off.items(), key=lambda item: -item[1])[:10])
    assert max(off.values()) < CLOSE, worst

    found = torch.stack([part["trajectory"] for part in parts])
    for b, crop in enumerate(crops()):
        # Shares of atoms, of all steps and structures, in the order of ranks.
        coords = torch.cat([*found[:, :, b]], 2)[:, :, : len(crop.atoms.atom)]
        wanted = torch.from_numpy(golden[f"trajectory_{b}"])
        for step, (x, y) in enumerate(zip(coords, wanted)):
            assert (x - y).abs().max() < CLOSE * y.abs().max(), f"step {step} of the sampling of crop {b}"
