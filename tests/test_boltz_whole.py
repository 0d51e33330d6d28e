"""The whole of Boltz-2 against the stock ``boltz`` package: a training step, and a round trip of weights.

Both sides run their own training step: trunk with one recycling, sampled structures, noised copies and their denoising,
distogram, b-factors, confidences, all losses with Boltz-2's weights, and the backward pass; in fp64, on crops of real
entries. The package gets what ours drew.

Known differences, which are taken out of the comparison:

- the noise levels of the copies of a sample are drawn one by one here; the package can do so, and by default gives all
  of them one level;
- dropout is drawn otherwise, and is off;
- the truth that confidences are judged by is renamed by another search (``tests/test_symmetry.py``): the package is
  given ours;
- aligned errors are judged at the residues that are resolved in the truth as renamed; the package asks for residues
  with a frame in the truth as it came, and a place in the truth of the first structure: in these crops all have;
- the package centres what it samples on all atoms, padded ones included: the crops have whole windows of atoms;
- the package takes one complex at a time. Ours takes both in one batch, so one of them is padded.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cpfold_train.__main__ import main
from cpfold_train.checkpoints.boltz import boltz_name, initialise
from cpfold_train.checkpoints.export import hyper_parameters
from cpfold_train.cli.bench import boltz_python
from cpfold_train.config.schema import DiffusionRunConfig, LossConfig, OptimConfig
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.stream.batch import Augmentation, Crop, collate, make_crop
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.losses import total
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import (
    AtomConfig,
    ConfidenceConfig,
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    MSAConfig,
    PairformerConfig,
    TemplateConfig,
)
from cpfold_train.parallel.context import to_local
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.training.module import CoFoldingModule
from tests.atoms import dense

CONFIG = ModelConfig(
    16, 8, 64, 1,
    MSAConfig(8, 2, 0.0, 0.0, 4, 2), PairformerConfig(2, 4, 0.0, 4, 2), AtomConfig(8, 4, 1, 2, 1, 2),
    DiffusionConfig(2, 4, 1, 12, step_scale=1.0), TemplateConfig(6, 1, 0.0, 4, 2),
    ConfidenceConfig(PairformerConfig(1, 4, 0.0, 4, 2), 10, 20.0, 9, 11, 12),
)  # fmt: skip
"""Small, without dropout, and with steps of sampling that end near the truth even of a model that knows nothing."""
WEIGHTS = LossConfig(4.0, 4.0, 0.03, 1e-3, 1e-4, 1e-4, 1e-4, 1e-4)
COPIES, STRUCTURES, STEPS = 3, 2, 3
"""Noised copies, sampled structures and the steps of sampling."""
DRAWN = DiffusionRunConfig(COPIES, STEPS, STRUCTURES, 0)
OPTIM = OptimConfig(1e-3, 1, 1.0, 1, (0.9, 0.95), 1e-8, 0.0, 0.999)
SEED = 0
"""With which the step draws one recycling."""
VANISHING = {
    "cyclic_conditioning_init.weight": "no chain is a ring",
    "atom_feat_to_atom_pos_update.0.bias": "it shifts all atoms alike, and the losses superpose",
    "norm_z.bias": "it adds the same to all scores of a softmax",
    "attention.proj_z.0.bias": "the same",
    "proj_z.0.0.bias": "the same",
    "proj_z.0.bias": "the same",
    "proj_z.1.0.bias": "the same",
}
"""Ends of the names of parameters whose gradient is zero but for rounding, and why."""
ORACLE = Path(__file__).parent / "oracle" / "boltz_whole.py"


@cache
def crops() -> list[Crop]:
    """Protein and a ligand, with two templates; protein and DNA, with a pocket and contacts given away.

    Each has three chains, and the second one's sequences have deletions.
    """
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == "7pzb")
    structure, alignments, _ = read_sample(entry)
    templates = [make_template(structure, structure, chains) for chains in ([(0, 1)], [(0, 0), (1, 1)])]
    hints = Augmentation(pocket=0.9, contact=0.9)
    return [
        make_crop(structure, alignments, templates, crop_size=40, max_msa_rows=5, draw=(0, 0, 34)),
        make_crop(structure, alignments, crop_size=32, max_msa_rows=14, augmentation=hints, draw=(0, 0, 17)),
    ]


def features(chosen: list[Crop], grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of crops as one rank gets it."""
    batch = collate(chosen, grid)
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
        if name != "id"
    }


def package_features(crop: Crop, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of one crop in the package's dense forms."""
    feats = features([crop], Grid(), dtype)
    tokens, atoms = feats["token_pad_mask"].shape[1], feats["atom_pad_mask"].shape[1]
    assert tokens == len(crop.tokens) and atoms == len(crop.atoms.atom), "the package does not mask all padding"
    classes = {"contact_conditioning": 5, "disto_target": CONFIG.num_bins, "template_restype": 33}
    classes["token_to_rep_atom"] = atoms
    polymer = (feats["token_resolved_mask"][0] > 0) & (feats["mol_type"][0] != 3)
    forms = dense(feats) | {name: one_hot(feats[name].long(), count) for name, count in classes.items()}
    forms["r_set_to_rep_atom"] = one_hot(feats["token_to_center_atom"][:, polymer].long(), atoms)
    # With a dim of conformers.
    forms |= {name: feats[name][:, None] for name in ("coords", "frames_idx", "frame_resolved_mask")}
    forms["frames_idx"] = forms["frames_idx"].long()
    dtypes = dict.fromkeys([*classes, *dense(feats), "r_set_to_rep_atom"], dtype) | {"ref_space_uid": torch.long}
    forms = {name: x.to(dtypes[name]) if name in dtypes else x for name, x in forms.items()}
    # The package has no use for what says on the host which atoms a token has.
    return {name: x for name, x in (feats | forms).items() if isinstance(x, Tensor)}


def weights() -> dict[str, Tensor]:
    """Weights of a model of which none is zero and none saturates: many start at zero, and zeros hide errors."""
    torch.manual_seed(5)
    model = CoFolding(CONFIG, MemoryConfig())
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1:
                x.normal_().mul_(0.6 * x.shape[1] ** -0.5)
            else:
                x.normal_().mul_(0.3).add_("norm" in name and name.endswith("weight"))
    return model.state_dict()


def our_step(cp, state: dict[str, Tensor], dtype: torch.dtype) -> dict:
    """This rank's shares of the losses and gradients, and the truth of each sampled structure."""
    module = CoFoldingModule(CONFIG, MemoryConfig(), OPTIM, WEIGHTS, DRAWN, SEED)
    module.model.load_state_dict(state)
    module = module.to(dtype).train()
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    found, matched = {}, total.matched_truth

    def noted(*args):
        found["truth"] = matched(*args)
        return found["truth"]

    total.matched_truth = noted
    try:
        step = module.training_step(features(crops(), cp.grid, dtype), 0)
    finally:
        total.matched_truth = matched
    step["loss"].backward()
    size = cp.grid.cp_size
    grads = {boltz_name(name): p.grad / size for name, p in module.model.named_parameters() if p.grad is not None}
    return {"losses": step["partial_losses"], "grads": grads, **found}


def normals_of(crop: Crop, dtype: torch.dtype) -> list[Tensor]:
    """Every normal deviate that ours draws, in the package's order."""
    draws, deviates = RandomStreams(torch.tensor([crop.sample_key])), 3 * len(crop.atoms.atom)
    sampled, noised = draws.at("sampling").copies(STRUCTURES), draws.at("diffusion").copies(COPIES)
    found = [sampled.at("start").at("noise").normal(0, deviates)]
    for step in range(STEPS):
        found += placement_and_noise(sampled.at("step", step), deviates)
    found += [noised.at("sigma").normal(0, 1), *placement_and_noise(noised, deviates)]
    return [x.to(dtype) for x in found]


def placement_and_noise(draws: RandomStreams, deviates: int) -> list[Tensor]:
    sizes = {"rotation": 4, "translation": 3, "noise": deviates}
    return [draws.at(site).normal(0, size) for site, size in sizes.items()]


def package(action: str, folder: Path) -> None:
    """Let the package work on the files in a folder."""
    subprocess.run([boltz_python(), str(ORACLE), action, str(folder)], check=True)


def package_settings() -> dict:
    """Arguments of the package's Boltz2, in plain values."""
    given = hyper_parameters(CONFIG)
    del given["validate_structure"]
    training = dict(given.pop("training_args"))
    training |= {"sampling_steps": STEPS, "diffusion_multiplicity": COPIES, "diffusion_samples": STRUCTURES}
    given["training_args"] = training | {"symmetry_correction": False}
    given["validation_args"] = dict(given["validation_args"])
    given["diffusion_process_args"]["synchronize_sigmas"] = False
    return given | {"no_random_recycling_training": True, "alpha_pae": 1.0}


def both_train(ranks, folder: Path, dtype: torch.dtype) -> tuple[list[dict], dict]:
    """What a rank alone computes, and what the package does."""
    state = weights()
    parts = ranks.run(our_step, 1, 1, state, dtype)
    truth = zip(*(x.split(STRUCTURES) for x in parts[0]["truth"]))
    samples = []
    for crop, (coords, resolved) in zip(crops(), truth):
        atoms = len(crop.atoms.atom)
        known = {"coords": coords[:, :atoms], "resolved": resolved[:, :atoms].to(dtype)}
        samples.append({"feats": package_features(crop, dtype), "normals": normals_of(crop, dtype), **known})
    state = {boltz_name(name): x for name, x in state.items()}
    torch.save({"settings": package_settings(), "state": state, "samples": samples}, folder / "train.pt")
    package("train", folder)
    return parts, torch.load(folder / "trained.pt", weights_only=True)


def deviations(parts: list[dict], expected: dict) -> dict[str, float]:
    """How far the losses and gradients are from the package's, relative to each loss and to the largest entry of each
    gradient, or of all gradients where one vanishes."""
    assert all(part["grads"].keys() == expected["grads"].keys() for part in parts)
    assert expected["losses"].keys() == parts[0]["losses"].keys()
    largest = max(x.abs().max() for x in expected["grads"].values())
    off = {}
    for kind in ("losses", "grads"):
        for name, x in expected[kind].items():
            vanishes = name.endswith(tuple(VANISHING))
            assert vanishes == bool(x.abs().max() < 1e-7 * largest), f"the gradient of {name} says little"
            apart = (sum(part[kind][name] for part in parts) - x).abs().max()
            off[name] = (apart / (largest if vanishes else x.abs().max())).item()
    return off


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where files are exchanged with the package."""
    if not boltz_python():
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def trained(ranks, folder):
    return both_train(ranks, folder, torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_training_step_equals_the_package(ranks, trained, shape):
    alone, expected = trained
    parts = alone if shape == (1, 1) else ranks.run(our_step, *shape, weights(), torch.float64)
    off = deviations(parts, expected)
    worst = dict(sorted(off.items(), key=lambda item: -item[1])[:10])
    assert max(off.values()) < 1e-8, worst
    assert len(off) > 500


def our_optimizer_step(cp, stock: Path, run: Path) -> None:
    """Take the package's weights, train one step in fp32 and write a checkpoint as our training does."""
    module = CoFoldingModule(CONFIG, MemoryConfig(), OPTIM, WEIGHTS, DRAWN, SEED)
    initialise(module.model, stock, "raw")
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    optimizer = module.configure_optimizers()["optimizer"]
    module.train().training_step(features(crops(), cp.grid, torch.float32), 0)["loss"].backward()
    optimizer.step()
    hyper = {"model": asdict(CONFIG)}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": hyper, "global_step": 1}, run)


def our_outputs(cp, checkpoint: Path, given: dict) -> dict[str, Tensor]:
    """What the trunk, one denoising and the heads return of the first crop."""
    model = CoFolding(CONFIG, MemoryConfig())
    initialise(model, checkpoint, "raw")
    model, feats = model.double().eval(), features(crops()[:1], cp.grid, torch.float64)
    with torch.no_grad():
        trunk = to_local(model.trunk(feats, cp, 1, None))
        s_inputs, s, z = (trunk[name] for name in ("s_inputs", "s", "z"))
        conditioning = model.diffusion_conditioning(s, z, model.trunk.rel_pos(feats, cp), feats, cp)
        denoised = model.structure_module.denoise(given["noisy"], given["sigmas"], s_inputs, s, feats, conditioning, cp)
        heads = model.predict_confidence(trunk, denoised, feats, cp, None)
        return {**trunk, **heads, "pbfactor": model.bfactor_module(s), "sample_atom_coords": denoised}


def test_round_trip_through_a_step_of_training(ranks, trained, folder):
    """The package's checkpoint, one optimizer step of ours, exported, loaded by the package strictly: same outputs."""
    ranks.run(our_optimizer_step, 1, 1, folder / "stock.ckpt", folder / "own.ckpt")
    assert main(["export-boltz", str(folder / "own.ckpt"), str(folder / "out.ckpt"), "--weights", "raw"]) == 0
    before, after = (torch.load(folder / name, weights_only=False)["state_dict"] for name in ("stock.ckpt", "out.ckpt"))
    assert before.keys() == after.keys()
    still = {name for name, x in before.items() if torch.equal(x, after[name])}
    learned = {boltz_name(name) for name, x in CoFolding(CONFIG, MemoryConfig()).named_parameters() if x.requires_grad}
    assert not {name for name in still & learned if not name.endswith(tuple(VANISHING))}

    feats = package_features(crops()[0], torch.float64)
    sigmas = torch.tensor([0.5, 20.0], dtype=torch.float64)
    noise = torch.randn(2, *feats["ref_pos"].shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = {"noisy": feats["coords"][:, 0] + sigmas[:, None, None] * noise, "sigmas": sigmas}
    torch.save({"feats": feats, "recycling_steps": 1, **given}, folder / "run.pt")
    package("run", folder)
    expected = torch.load(folder / "ran.pt", weights_only=True)
    (found,) = ranks.run(our_outputs, 1, 1, folder / "out.ckpt", given)
    for name, x in expected.items():
        assert (found[name] - x).abs().max() < 1e-10 * x.abs().max(), name
