"""Coordinates, noise levels and masks of atoms keep their precision whatever the precision of a run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpfold_train.data.batch import collate
from cpfold_train.data.make_template import make_template
from cpfold_train.data.shards import open_shards, read_sample
from cpfold_train.losses.total import structure_losses
from cpfold_train.model.config import ConfidenceConfig, DiffusionConfig, MemoryConfig
from cpfold_train.model.edm import AtomDiffusion
from cpfold_train.ops.rigid_align import weighted_rigid_align
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import Draws
from cpfold_train.training import metrics
from cpfold_train.training.config import DiffusionRunConfig, FinetuneConfig, LossConfig, OptimConfig
from cpfold_train.training.module import CoFoldingModule
from tests.complexes import crops
from tests.half_precision import HalfPrecision, Kind
from tests.parity import randomise
from tests.test_precision import BF16, SMALL

ONE_BLOCK = replace(SMALL.pairformer, num_blocks=1)
NUMBERS = """
coords copy_coords ref_pos disto_center template_frame_rot template_frame_t template_ca template_cb
""".split()
CHOICES = """
atom_pad_mask atom_resolved_mask copy_resolved token_resolved_mask token_disto_mask frame_resolved_mask
""".split()


@cache
def batch() -> dict:
    """A protein, DNA and a ligand, with a template."""
    crop = crops()[0]
    template = make_template(crop.structure, crop.structure, [(0, 0)])
    return collate([replace(crop, templates=[template])], Grid()) | {"filler": torch.zeros(1, dtype=torch.bool)}


def steps(cp, precision: str) -> dict[str, tuple[list[str], int]]:
    """What is found in a training step, a validation step and a prediction, and how many numbers were followed."""
    module = CoFoldingModule(
        replace(SMALL, recycling_steps=1, pairformer=ONE_BLOCK, confidence=ConfidenceConfig(ONE_BLOCK)),
        MemoryConfig(samples_at_once=1),
        OptimConfig(1e-3, 1, 0.9, 1, (0.9, 0.95), 1e-8, 0.0),
        LossConfig(*[1.0] * 8),
        DiffusionRunConfig(multiplicity=2, sampling_steps=3, samples=2, validation_steps=2),
        seed=0,
        finetune=FinetuneConfig(),
    )
    randomise(module)
    for parameter in module.parameters():
        parameter.data *= 0.3
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    if precision == "bf16-true":
        module.model.trunk.pair_dtype = BF16
    sampling = {"recycling_steps": 1, "sampling_steps": 2, "samples": 2, "draws": Draws(batch()["sample_key"])}
    runs = {
        "training": lambda: module.training_step(batch(), 0)["loss"],
        "validation": lambda: module.validation_step(batch(), 0),
        "prediction": lambda: module.model.predict(batch(), cp, **sampling),
    }
    return {name: followed(run, module, name == "training") for name, run in runs.items()}


def followed(run, module, backward: bool) -> tuple[list[str], int]:
    mode, normal = HalfPrecision(), Draws.normal
    for parameter in module.parameters():
        mode.mark(parameter, Kind.WEIGHT)
    for names, kind in ((NUMBERS, Kind.NUMBER), (CHOICES, Kind.CHOICE)):
        for name in names:
            mode.mark(batch()[name], kind)
    mode.mark(metrics.BOUNDARIES, Kind.NUMBER)
    Draws.normal = lambda *args: mode.mark(normal(*args), Kind.NUMBER)
    try:
        with mode:
            with torch.set_grad_enabled(backward), torch.autocast("cpu", BF16):
                out = run()
            if backward:
                out.backward()
    finally:
        Draws.normal = normal
    return mode.found, mode.numbers


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_no_step_makes_a_half_precision_number(ranks, precision):
    (found,) = ranks.run(steps, 1, 1, precision)
    assert all(numbers > 500 for _, numbers in found.values())
    lines = {f"{name}: {line}" for name, (lines, _) in found.items() for line in lines}
    assert not lines, "\n".join(sorted(lines))


def unit(cp) -> AtomDiffusion:
    """The process with a network that changes nothing."""
    process = AtomDiffusion(8, SMALL.atoms, SMALL.diffusion, MemoryConfig())
    process.denoise = lambda noisy, *_: noisy
    return process


def placed(cp, coords: list[Tensor]) -> list[tuple[float, float]]:
    """How far the truth of each complex, (A, 3), is from a rigid motion of it in bf16-mixed: rms and most, Angstrom."""
    found = []
    for number, x in enumerate(coords):
        mask = torch.ones(1, len(x))
        feats = {"coords": x[None], "atom_pad_mask": mask}
        with torch.autocast("cpu", BF16):
            out = unit(cp)(None, None, feats, None, 1, Draws(torch.tensor([number])), cp)
        truth = out["aligned_true_atom_coords"].double()
        error = (weighted_rigid_align(x[None].double(), truth, mask, mask, cp) - truth).square().sum(-1)
        found.append((float(error.mean().sqrt()), float(error.max().sqrt())))
    return found


def test_the_truth_is_moved_as_a_whole(ranks):
    """Every entry of the data that comes with the package."""
    structures = [read_sample(entry)[0] for entry in open_shards(["data/shards/*.tar", "data/large/*.tar"])]
    (found,) = ranks.run(placed, 1, 1, [torch.from_numpy(x.coords[x.resolved]) for x in structures])
    for structure, (rms, most) in zip(structures, found):
        print(f"{structure.meta['id']}: {len(structure.asym_id)} tokens, rms {rms:.1e}, most {most:.1e}")
        assert rms < 3e-5 and most < 1e-4
    assert len(found) > 10
