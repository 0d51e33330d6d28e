"""The case as the stock ``boltz`` package is given it, and what it makes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cpfold_train.checkpoints.boltz import boltz_name
from cpfold_train.checkpoints.export import hyper_parameters
from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.stream.batch import Crop
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from tests.atoms import dense
from tests.golden.case import CONFIG, COPIES, STEPS, STRUCTURES, crops, features, weights

ORACLE = Path(__file__).parents[1] / "oracle" / "boltz_whole.py"


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


def package_trains(ours: dict, folder: Path, dtype: torch.dtype) -> dict:
    """Losses, gradients and sampled structures of the package's training step.

    Args:
        ours: what a rank alone returned of :func:`~tests.golden.case.our_step`.
        folder: receives the files that are exchanged.
        dtype: of the computation.
    """
    truth = zip(*(x.split(STRUCTURES) for x in ours["truth"]))
    samples = []
    for crop, (coords, resolved) in zip(crops(), truth):
        atoms = len(crop.atoms.atom)
        known = {"coords": coords[:, :atoms], "resolved": resolved[:, :atoms].to(dtype)}
        samples.append({"feats": package_features(crop, dtype), "normals": normals_of(crop, dtype), **known})
    state = {boltz_name(name): x for name, x in weights().items()}
    torch.save({"settings": package_settings(), "state": state, "samples": samples}, folder / "train.pt")
    package("train", folder)
    return torch.load(folder / "trained.pt", weights_only=True)
