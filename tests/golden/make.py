"""Make the golden values: what the stock ``boltz`` package computes of the case, so that no clone is without them.

    BOLTZ_PYTHON=/path/to/python python -m tests.golden.make

The interpreter that ``BOLTZ_PYTHON`` names has the package, which is to be 2.2.1. The values change only with the case
itself: the crops, the weights, the random draws. A change of the model or of a loss has to leave them alone.

The file holds each loss, of each gradient its norm and some projections, and the structures of one sampling.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpfold_train.cli.bench import boltz_python
from cpfold_train.parallel.random import RandomStreams, key_of
from tests.golden.case import our_step, weights
from tests.golden.stock import package_trains
from tests.ranks import RankPool

GOLDEN = Path(__file__).parent / "boltz-2.2.1.npz"
PROJECTIONS = 3


def summary(name: str, x: Tensor) -> Tensor:
    """The norm of a tensor, and its products with fixed vectors of ones and minus ones: (1 + PROJECTIONS,)."""
    x = x.flatten()
    draws = RandomStreams(torch.tensor([key_of("projection", name)])).each(last=range(PROJECTIONS))
    signs = 2 * (draws.uniform(0, len(x)).squeeze(1) < 0.5).to(x) - 1
    return torch.cat([x.norm()[None], signs @ x])


def main() -> None:
    """Write the file."""
    python = boltz_python()
    if not python:
        sys.exit("error: the boltz package is absent: type pip install boltz==2.2.1, or BOLTZ_PYTHON=its interpreter")
    version = "from importlib.metadata import version; print(version('boltz'))"
    found = subprocess.run([python, "-c", version], capture_output=True, text=True, check=True).stdout.strip()
    if f"boltz-{found}.npz" != GOLDEN.name:
        sys.exit(f"error: this is boltz {found}: type pip install boltz==2.2.1")
    with tempfile.TemporaryDirectory() as folder:
        ranks = RankPool(1, Path(folder))
        (ours,) = ranks.run(our_step, 1, 1, weights(), torch.float64)
        ranks.close()
        expected = package_trains(ours, Path(folder), torch.float64)
    losses, grads = expected["losses"], expected["grads"]
    arrays = {f"trajectory_{b}": x for b, x in enumerate(expected["trajectories"])}
    arrays["losses"] = torch.stack([*losses.values()])
    arrays["grads"] = torch.stack([summary(name, x) for name, x in grads.items()])
    names = {"loss_names": [*losses], "grad_names": [*grads]}
    np.savez_compressed(GOLDEN, **{name: x.numpy() for name, x in arrays.items()}, **names)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1000:.0f} kB, {len(grads)} gradients, {len(losses)} losses")


if __name__ == "__main__":
    main()
