"""Atom encoder and decoder against the stock ``boltz`` package on crops of real entries: fp64, every gradient."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.stream.batch import collate, make_crop
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.model.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.parallel.grid import Grid
from tests.atoms import dense
from tests.parity import cut, join, randomise

ORACLE = Path(__file__).parent / "oracle" / "boltz_atoms.py"
TOKEN_S, TOKEN_Z, DEPTH, HEADS, M = 6, 5, 2, 2, 3
CONFIG = AtomConfig(8, 4, DEPTH, HEADS, DEPTH, HEADS)
PLACEMENTS = {"s_trunk": "token", "z": "pair", "r": "atom", "a": "shard", "r_update": "atom"}


class Atoms(nn.Module):
    """What the diffusion module does with atoms, without the transformer of tokens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.atom_encoder = AtomEncoder(CONFIG, TOKEN_S, TOKEN_Z, True)
        self.proj_enc, self.proj_dec = (
            nn.Sequential(nn.LayerNorm(CONFIG.atom_z), nn.Linear(CONFIG.atom_z, DEPTH * HEADS, bias=False))
            for _ in range(2)
        )
        self.atom_attention_encoder = AtomAttentionEncoder(CONFIG, TOKEN_S, True, MemoryConfig())
        self.atom_attention_decoder = AtomAttentionDecoder(CONFIG, TOKEN_S, MemoryConfig(recompute=False))

    def forward(self, feats, cp, s_trunk, z, r):
        q, c, p = self.atom_encoder(feats, cp, s_trunk, z)
        a, q, c = self.atom_attention_encoder(feats, q, c, self.proj_enc(p), cp, r, M)
        return a, self.atom_attention_decoder(a, q, c, self.proj_dec(p), feats, cp)


def atoms():
    module = Atoms().double()
    randomise(module)
    return module


@lru_cache
def crops():
    """A ligand, one token an atom, with a few residues; and protein with DNA."""
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == "7pzb")
    sample = read_sample(entry)
    return [make_crop(*sample, crop_size=30, max_msa_rows=2, draw=(0, 0, position)) for position in (1, 5)]


def features(grid):
    """A batch of the two crops as one rank gets it, in fp64."""
    batch = collate(crops(), grid)
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
        if name != "id"
    }


def value(name, grid):
    """A random value of each real token, pair or atom, the same on any grid, and zero where padded: a rank's part."""
    tokens, atoms = max(len(crop.tokens) for crop in crops()), max(len(crop.atoms.atom) for crop in crops())
    shape, padded = {
        "s_trunk": ((2, tokens, TOKEN_S), (grid.pad_tokens(tokens),)),
        "z": ((2, tokens, tokens, TOKEN_Z), (grid.pad_tokens(tokens),) * 2),
        "r": ((2 * M, atoms, 3), (grid.pad_atoms(atoms),)),
        "a": ((2 * M, tokens, 2 * TOKEN_S), (grid.pad_tokens(tokens),)),
        "r_update": ((2 * M, atoms, 3), (grid.pad_atoms(atoms),)),
    }[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
    for i, crop in enumerate(crops()):
        own = x.unflatten(0, (2, -1))[i]
        size = len(crop.atoms.atom) if PLACEMENTS[name] == "atom" else len(crop.tokens)
        own[:, size:] = 0
        if name == "z":
            own[:, :, size:] = 0
    widths = [width for dim, size in enumerate(padded, start=1) for width in (size - x.shape[dim], 0)]
    return cut(pad(x, [0, 0, *widths[::-1]]), PLACEMENTS[name], grid)


def our_step(cp):
    """Outputs at real tokens and atoms, and partial gradients, of this rank."""
    module, feats = atoms(), features(cp.grid)
    inputs = {name: value(name, cp.grid).requires_grad_() for name in ("s_trunk", "z", "r")}
    out = dict(zip(("a", "r_update"), module(feats, cp, **inputs)))
    weights = {name: value(name, cp.grid) for name in out}
    sum((x * weights[name]).sum() for name, x in out.items()).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    real = {name: (x * (weights[name] != 0)).detach() for name, x in out.items()}
    return real | {name: x.grad for name, x in inputs.items()}, grads


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """What the package computes."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    folder, one = tmp_path_factory.mktemp("oracle"), Grid()
    feats = features(one)
    assert (feats["mol_type"][0] == 3).sum() > 20 and (feats["mol_type"][1] == 1).sum() > 3
    sizes = {"atom_s": 8, "atom_z": 4, "token_s": TOKEN_S, "token_z": TOKEN_Z, "depth": DEPTH, "heads": HEADS}
    given = {"sizes": sizes, "state": atoms().state_dict(), "feats": dense(feats), "multiplicity": M}
    given["inputs"] = {name: value(name, one) for name in ("s_trunk", "z", "r")}
    given["weights"] = {name: value(name, one) for name in ("a", "r_update")}
    torch.save(given, folder / "in.pt")
    subprocess.run([python, str(ORACLE), str(folder / "in.pt"), str(folder / "out.pt")], check=True)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_atoms_equal_the_package(ranks, oracle, shape):
    grid, parts = Grid(*shape), ranks.run(our_step, *shape)
    weights = {name: value(name, Grid()) for name in ("a", "r_update")}
    for name, placement in PLACEMENTS.items():
        expected = oracle["grads"][name] if name in oracle["grads"] else oracle[name] * (weights[name] != 0)
        ours = join([part[0][name] for part in parts], placement, grid, partial=True)
        for dim in range(1, 3 if name == "z" else 2):
            assert not ours.narrow(dim, expected.shape[dim], ours.shape[dim] - expected.shape[dim]).any()
            ours = ours.narrow(dim, 0, expected.shape[dim])
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    names = {name for name, grad in oracle["grads"].items() if grad is not None} - {*PLACEMENTS}
    assert names == {*parts[0][1]} and len(names) > 60
    for name in names:
        total, expected = sum(part[1][name] for part in parts), oracle["grads"][name]
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            total / scale, expected / scale, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected.any(), f"the gradient of {name} is zero: the test cannot fail"
