"""The confidence module and its scores on every grid, against 1x1 and against the stock ``boltz`` package, in fp64."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from cpfold_train.cli.bench import boltz_python
from cpfold_train.model.bfactor import BFactorModule
from cpfold_train.model.confidence import ConfidenceModule
from cpfold_train.model.confidence_scores import confidence_scores
from cpfold_train.model.config import ConfidenceConfig, MemoryConfig, ModelConfig, PairformerConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.testing.trunk_cases import features
from cpfold_train.vocabulary import DNA, NONPOLYMER, PROTEIN
from tests.parity import LENGTHS, cut, join, pad, randomise, real

C_S, C_Z, M = 16, 10, 2
N, B = max(LENGTHS), len(LENGTHS)
CONFIG = ModelConfig(
    C_S, C_Z, 64,
    confidence=ConfidenceConfig(PairformerConfig(2, 4, 0.25, 6, 2), 12, 16.0, 9, 64, 64),
)  # fmt: skip
ORACLE = Path(__file__).parent / "oracle" / "boltz_confidence.py"
CHAIN = torch.tensor([0] * 3 + [1] * 2 + [2] * 4 + [3] * 3 + [4])
KIND = torch.tensor([PROTEIN, PROTEIN, NONPOLYMER, DNA, NONPOLYMER])[CHAIN]
ATOM_TOKEN = torch.arange(N).repeat_interleave(torch.where(KIND == NONPOLYMER, 1, 12))
ATOMS = [int(torch.searchsorted(ATOM_TOKEN, n)) for n in LENGTHS]
"""Atoms of the two complexes: one of a ligand's token, twelve of others, so that several ranks have some."""
TILES = ("pae_logits", "pde_logits", "pae", "pde")
TOKENS = ("plddt_logits", "resolved_logits", "plddt", "pbfactor")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complexes() -> dict[str, torch.Tensor]:
    """Two complexes of two proteins and a ligand of four atoms, one with DNA and an ion too; M structures of each."""
    first, polymer = torch.searchsorted(ATOM_TOKEN, torch.arange(N)), (KIND != NONPOLYMER).long()
    return {
        "asym_id": CHAIN.expand(B, N),
        "mol_type": KIND.expand(B, N),
        "token_to_rep_atom": (first + 5 * polymer).expand(B, N),
        "frames_idx": (first[:, None] + polymer[:, None] * torch.tensor([2, 5, 9])).expand(B, N, 3),
        "x": 3 * random(B * M, len(ATOM_TOKEN), 3, seed=4),
        "s_inputs": random(B, N, C_S, seed=5),
        "s": random(B, N, C_S, seed=6),
        "z": random(B, N, N, C_Z, seed=7),
        "pdistogram": random(B, N, N, 1, 64, seed=8),
    }


def padded(grid: Grid) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Features of a rank, and its parts of the module's inputs."""
    whole = complexes()
    x = whole.pop("x")
    real_atoms = torch.stack([torch.arange(x.shape[1]) < a for a in ATOMS]).repeat_interleave(M, 0)
    x = x * real_atoms[..., None]
    x = torch.cat([x, x.new_zeros(B * M, grid.pad_atoms(x.shape[1]) - x.shape[1], 3)], 1)
    placed = {
        name: cut(pad(whole[name], kind, grid), kind, grid)
        for name, kind in (("s_inputs", "token"), ("s", "token"), ("z", "pair"), ("pdistogram", "pair"))
    }
    given = {
        name: pad(whole[name], "token", grid) for name in ("asym_id", "mol_type", "token_to_rep_atom", "frames_idx")
    }
    feats = features(grid) | given
    for name in given:
        feats[name] = feats[name] * feats["token_pad_mask"].long().unflatten(1, (-1, *[1] * (feats[name].ndim - 2)))
    return feats, placed | {"x": x[:, slice(*grid.atoms(x.shape[1]))]}


def build() -> torch.nn.ModuleDict:
    modules = {"confidence_module": ConfidenceModule(CONFIG, MemoryConfig()), "bfactor_module": BFactorModule(C_S, 8)}
    modules = torch.nn.ModuleDict(modules).double()
    randomise(modules)
    return modules


def our_step(cp, dropout: bool) -> tuple[dict, dict, dict]:
    """This rank's outputs and its part of the gradients of parameters and inputs."""
    modules = build()
    feats, given = padded(cp.grid)
    for name in ("s_inputs", "s", "z"):
        given[name] = given[name].requires_grad_()
    inputs = given["s_inputs"], given["s"], given["z"], given["x"], feats
    draws = RandomStreams(torch.tensor([3, 4])) if dropout else None
    out = modules["confidence_module"](*inputs, M, cp, draws)
    scores = confidence_scores(out, given["x"], given["pdistogram"], feats, M, cp)
    out["pbfactor"] = modules["bfactor_module"](given["s"]).repeat_interleave(M, 0)
    loss = 0
    for name, logits in out.items():
        kind = "pair" if name in TILES else "token"
        weight = weights(name, logits.shape[-1])
        share = cut(pad(weight, kind, cp.grid), kind, cp.grid) / (1 if name in TILES else cp.grid.cp_size)
        loss = loss + (logits * share).sum()
    loss.backward()
    inputs = {name: given[name].grad for name in ("s_inputs", "s", "z")}
    return (
        {name: x.detach() for name, x in (out | scores).items()},
        {name: p.grad for name, p in modules.named_parameters() if p.grad is not None},
        inputs,
    )


def weights(name: str, bins: int) -> torch.Tensor:
    """Fixed weights (B M, N[, N], bins) of the loss, of which those of padded tokens are zero."""
    sizes, kind = ((N, N), "pair") if name in TILES else ((N,), "token")
    seeds = [10 * len(name) + m for m in range(M)]
    return torch.stack([real(random(B, *sizes, bins, seed=seed), kind) for seed in seeds], 1).flatten(0, 1)


def of_real(x: torch.Tensor, name: str) -> torch.Tensor:
    """What belongs to real tokens of the B M samples."""
    if name in TILES:
        return torch.stack([real(part, "pair") for part in x.unflatten(0, (B, M)).unbind(1)], 1)
    if name in TOKENS:
        return torch.stack([real(part, "token") for part in x.unflatten(0, (B, M)).unbind(1)], 1)
    return x


def whole(parts: list, grid: Grid) -> tuple[dict, dict, dict]:
    """Outputs and gradients over all ranks, of real tokens."""
    out = {
        name: of_real(join([p[0][name] for p in parts], "pair" if name in TILES else "token", grid, False), name)
        for name in parts[0][0]
    }
    grads = {name: sum(p[1][name] for p in parts) for name in parts[0][1]}
    kinds = {"s_inputs": "token", "s": "token", "z": "pair"}
    inputs = {name: real(join([p[2][name] for p in parts], kind, grid, True), kind) for name, kind in kinds.items()}
    return out, grads, inputs


def assert_close(ours: dict, expected: dict, rtol: float) -> None:
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(1.0, x.abs().max().item())
        torch.testing.assert_close(
            ours[name] / scale, x / scale, rtol=rtol, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert x.abs().max() > 0, f"{name} is zero: the test cannot fail"


@pytest.mark.parametrize(
    "shape",
    [(1, 2), (2, 3), (3, 1), pytest.param((3, 3), marks=pytest.mark.slow)],
    ids=lambda g: f"{g[0]}x{g[1]}",
)
def test_grid_parity(ranks, shape):
    serial = whole(ranks.run(our_step, 1, 1, True), Grid())
    parts = whole(ranks.run(our_step, *shape, True), Grid(*shape))
    for ours, expected in zip(parts, serial):
        assert_close(ours, expected, 1e-8)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """What the package computes: outputs, gradients of parameters and of inputs, padded to the longer complex."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    folder = tmp_path_factory.mktemp("oracle")
    own = CONFIG.confidence
    args = {
        "token_s": C_S, "token_z": C_Z, "num_dist_bins": own.num_dist_bins, "max_dist": own.max_dist,
        "add_s_to_z_prod": True, "add_s_input_to_s": True, "add_z_input_to_z": True, "bond_type_feature": True,
        "fix_sym_check": True, "cyclic_pos_enc": True, "conditioning_cutoff_min": 4.0, "conditioning_cutoff_max": 20.0,
        "pairformer_args": vars(own.pairformer),
        "confidence_args": {"num_plddt_bins": own.num_plddt_bins, "num_pde_bins": own.num_pde_bins,
                            "num_pae_bins": own.num_pae_bins, "use_separate_heads": True},
    }  # fmt: skip
    modules = build()
    feats, given = padded(Grid())
    bins = {"plddt_logits": 9, "resolved_logits": 2, "pae_logits": 64, "pde_logits": 64, "pbfactor": 8}
    loss_weights = {name: weights(name, count).unflatten(0, (B, M)) for name, count in bins.items()}
    samples = [sample_of(feats, given, loss_weights, b, n) for b, n in enumerate(LENGTHS)]
    given = {"args": args, "bfactor_bins": 8, "state": modules.state_dict(), "multiplicity": M, "samples": samples}
    torch.save(given, folder / "in.pt")
    subprocess.run([python, str(ORACLE), str(folder / "in.pt"), str(folder / "out.pt")], check=True)
    found = torch.load(folder / "out.pt", weights_only=True)
    out, inputs = (
        {name: torch.cat([grown(sample[part][name], part, name) for sample in found["samples"]]) for name in
         found["samples"][0][part]}
        for part in ("out", "inputs")
    )  # fmt: skip
    return {name: of_real(x, name) for name, x in out.items()}, found["grads"], inputs


def sample_of(feats: dict, given: dict, loss_weights: dict, b: int, n: int) -> dict:
    """One complex of n tokens as the package takes it: without padding, and one-hot where ours are indices."""
    a = ATOMS[b]
    skipped = ("disto_target", "msa", "msa_mask", "has_deletion", "deletion_value", "msa_paired")
    own = {name: x[b : b + 1, :n] for name, x in feats.items() if name not in skipped}
    for name in ("token_bonds", "type_bonds", "contact_conditioning", "contact_threshold"):
        own[name] = own[name][:, :, :n]
    own["contact_conditioning"] = one_hot(own["contact_conditioning"], 5).double()
    own["token_to_rep_atom"] = one_hot(own["token_to_rep_atom"], a).double()
    own["atom_to_token"] = one_hot(ATOM_TOKEN[None, :a], n).double()
    own["atom_pad_mask"] = torch.ones(1, a).double()
    return {
        "feats": own,
        "s_inputs": given["s_inputs"][b : b + 1, :n].clone(),
        "s": given["s"][b : b + 1, :n].clone(),
        "z": given["z"][b : b + 1, :n, :n].clone(),
        "pdistogram": given["pdistogram"][b : b + 1, :n, :n],
        "x": given["x"].unflatten(0, (B, M))[b, :, :a],
        "weights": {name: w[b, :, :n, :n] if name in TILES else w[b, :, :n] for name, w in loss_weights.items()},
    }


def grown(x: torch.Tensor, part: str, name: str) -> torch.Tensor:
    """With zeros, up to the size of the longer complex."""
    chains = int(complexes()["asym_id"].max()) + 1
    pairs = name in TILES or (part == "inputs" and name == "z")
    sizes = (N, N) if pairs else (chains, chains) if name == "pair_chains_iptm" else (N,)
    for dim, size in enumerate(sizes[: x.ndim - 1], start=1):
        shape = list(x.shape)
        shape[dim] = size - x.shape[dim]
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_equals_the_package(ranks, oracle, shape):
    for ours, expected in zip(whole(ranks.run(our_step, *shape, False), Grid(*shape)), oracle):
        assert_close(ours, expected, 1e-8)
