"""The trunk against the stock ``boltz`` package: same weights, same features, fp64, outputs and every gradient.

The package runs in a process of its own: that of the interpreter that ``BOLTZ_PYTHON`` names, else of this one.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from cpfold_train.cli.bench import boltz_python
from cpfold_train.losses.distogram import distogram_loss
from cpfold_train.model.config import AtomConfig, MemoryConfig, ModelConfig, MSAConfig, PairformerConfig, TemplateConfig
from cpfold_train.model.trunk import Trunk
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.trunk_cases import features
from tests.atoms import dense
from tests.parity import LENGTHS, join, randomise, real

CONFIG = ModelConfig(
    16, 10, 8, 1,
    MSAConfig(12, 2, 0.0, 0.0, 6, 2), PairformerConfig(2, 4, 0.0, 6, 2),
    atoms=AtomConfig(8, 4, 2, 2), template=TemplateConfig(6, 2, 0.0, 6, 2),
)  # fmt: skip
ORACLE = Path(__file__).parent / "oracle" / "boltz_trunk.py"


def our_step(cp):
    """Outputs and partial gradients of this rank."""
    trunk = Trunk(CONFIG, MemoryConfig()).double()
    randomise(trunk)
    feats = features(cp.grid)
    out = trunk(feats, cp, recycling_steps=1, draws=None)
    losses = distogram_loss(out["pdistogram"], feats, cp)
    s = out["s"].to_local()
    (losses.sum() + (s * single_weight(s)).sum() / cp.grid.cp_size).backward()
    local = {name: x.to_local().detach() for name, x in out.items()}
    return local, losses.detach(), {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def single_weight(s: torch.Tensor) -> torch.Tensor:
    """Fixed weights of the real tokens' s, so that the single track has gradients."""
    n = max(LENGTHS)
    weight = torch.zeros_like(s)
    weight[:, :n] = torch.randn(s.shape[0], n, s.shape[2], generator=torch.Generator().manual_seed(2), dtype=s.dtype)
    for i, length in enumerate(LENGTHS):
        weight[i, length:] = 0
    return weight


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """What the package computes."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    folder = tmp_path_factory.mktemp("oracle")
    trunk = Trunk(CONFIG, MemoryConfig()).double()
    randomise(trunk)
    feats = features(Grid())
    feats["contact_conditioning"] = one_hot(feats["contact_conditioning"], 5).double()
    feats["disto_target"] = one_hot(feats["disto_target"], 8).double()
    feats["template_restype"] = one_hot(feats["template_restype"], 33).double()
    feats |= dense(feats)
    # The package has no use for what says on the host which atoms a token has.
    del feats["token_atom_start"]
    parts = {name: asdict(getattr(CONFIG, name)) for name in ("msa", "pairformer", "template")}
    atoms = {name: getattr(CONFIG.atoms, name) for name in ("atom_s", "atom_z")}
    atoms |= {name: getattr(CONFIG.atoms, name) for name in ("atom_encoder_depth", "atom_encoder_heads")}
    sizes = {"token_s": 16, "token_z": 10, "num_bins": 8, "atoms": atoms, **parts}
    weight = single_weight(torch.zeros(len(LENGTHS), max(LENGTHS), 16, dtype=torch.float64))
    given = {"sizes": sizes, "state": trunk.state_dict(), "feats": feats, "recycling_steps": 1, "weight": weight}
    torch.save(given, folder / "in.pt")
    subprocess.run([python, str(ORACLE), str(folder / "in.pt"), str(folder / "out.pt")], check=True)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_trunk_equals_the_package(ranks, oracle, shape):
    grid, parts = Grid(*shape), ranks.run(our_step, *shape)
    for name, placement in (("s", "token"), ("z", "pair"), ("pdistogram", "pair")):
        ours = real(join([part[0][name] for part in parts], placement, grid, partial=False), placement)
        torch.testing.assert_close(ours, real(oracle[name], placement), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sum(part[1] for part in parts), oracle["loss"], rtol=1e-8, atol=0)
    grads = parts[0][2]
    assert grads.keys() == oracle["grads"].keys()
    for name in grads:
        total, expected = sum(part[2][name] for part in parts), oracle["grads"][name]
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            total / scale, expected / scale, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
