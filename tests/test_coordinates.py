"""Coordinates, noise levels and masks of atoms keep their precision whatever the precision of a run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpfold_train.config.schema import DiffusionRunConfig, FinetuneConfig, LossConfig, OptimConfig
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.stream.batch import collate
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.losses.diffusion import diffusion_loss
from cpfold_train.losses.total import confidence_losses, structure_losses
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.confidence_scores import confidence_scores
from cpfold_train.model.config import ConfidenceConfig, MemoryConfig
from cpfold_train.model.edm import AtomDiffusion
from cpfold_train.ops.rigid_align import weighted_rigid_align
from cpfold_train.parallel.context import to_local
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.training import validation_metrics as metrics
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.validation import score_distances, score_structures
from tests.complexes import crops
from tests.half_precision import HalfPrecision, Kind
from tests.parity import randomise
from tests.test_precision import BF16, SMALL
from tests.tf32 import points_as_on_gpus

ONE_BLOCK = replace(SMALL.pairformer, num_blocks=1)
MARKED = {
    Kind.NUMBER: "coords copy_coords ref_pos disto_center template_frame_rot template_frame_t template_ca template_cb",
    Kind.CHOICE: "atom_pad_mask atom_resolved_mask copy_resolved token_resolved_mask token_disto_mask "
    "frame_resolved_mask",
}
"""Features that are followed, by name."""
NO_POINTS = ("_embed_rows", "_refined", "training/validation_metrics.py", "block_gradients")
"""Where matrix products are none of points: of signs, which TF32 knows; of activations that travelled in one
tensor with positions; of probabilities and centres of bins, for a score; of gradients."""


@cache
def batch() -> dict:
    """A protein, DNA and a ligand, with a template."""
    crop = crops()[0]
    template = make_template(crop.structure, crop.structure, [(0, 0)])
    return collate([replace(crop, templates=[template])], Grid()) | {"filler": torch.zeros(1, dtype=torch.bool)}


def small_module(sigma_data: float) -> CoFoldingModule:
    diffusion = replace(SMALL.diffusion, sigma_data=sigma_data)
    return CoFoldingModule(
        replace(
            SMALL, recycling_steps=1, pairformer=ONE_BLOCK, confidence=ConfidenceConfig(ONE_BLOCK), diffusion=diffusion
        ),
        MemoryConfig(samples_at_once=1),
        OptimConfig(1e-3, 1, 0.9, 1, (0.9, 0.95), 1e-8, 0.0),
        LossConfig(*[1.0] * 8),
        DiffusionRunConfig(multiplicity=2, sampling_steps=3, samples=2, validation_steps=2),
        seed=0,
        finetune=FinetuneConfig(),
    )


def steps(cp, precision: str) -> dict[str, tuple[list[str], list[str], int]]:
    """What is found in a training step, a validation step and a prediction: numbers in half precision, matrix products
    of numbers, and how many were followed."""
    module = small_module(SMALL.diffusion.sigma_data)
    randomise(module)
    for parameter in module.parameters():
        parameter.data *= 0.3
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    if precision == "bf16-true":
        module.model.trunk.pair_dtype = BF16
    sampling = {"recycling_steps": 1, "sampling_steps": 2, "samples": 2, "draws": RandomStreams(batch()["sample_key"])}
    runs = {
        "training": lambda: module.training_step(batch(), 0)["loss"],
        "validation": lambda: module.validation_step(batch(), 0),
        "prediction": lambda: module.model.predict(batch(), cp, **sampling),
    }
    with points_as_on_gpus() if precision == "32-true" else nullcontext():
        return {name: followed(run, module, name == "training", precision) for name, run in runs.items()}


def followed(run, module, backward: bool, precision: str) -> tuple[list[str], list[str], int]:
    mode, normal = HalfPrecision(), RandomStreams.normal
    for parameter in module.parameters():
        mode.mark(parameter, Kind.WEIGHT)
    for kind, names in MARKED.items():
        for name in names.split():
            mode.mark(batch()[name], kind)
    mode.mark(metrics.BOUNDARIES, Kind.NUMBER)
    RandomStreams.normal = lambda *args: mode.mark(normal(*args), Kind.NUMBER)
    try:
        with mode:
            with torch.set_grad_enabled(backward), torch.autocast("cpu", BF16, precision != "32-true"):
                out = run()
            if backward:
                out.backward()
    finally:
        RandomStreams.normal = normal
    return mode.found, mode.products, mode.numbers


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_no_step_makes_a_half_precision_number(ranks, precision):
    (found,) = ranks.run(steps, 1, 1, precision)
    assert all(numbers > 500 for *_, numbers in found.values())
    lines = {f"{name}: {line}" for name, (lines, *_) in found.items() for line in lines}
    assert not lines, "\n".join(sorted(lines))


def test_no_step_makes_a_matrix_product_of_numbers_on_gpus(ranks):
    """Which ``tf32=true`` would round."""
    (found,) = ranks.run(steps, 1, 1, "32-true")
    assert all(numbers > 500 for *_, numbers in found.values())
    lines = {f"{name}: {line}" for name, (_, lines, _) in found.items() for line in lines}
    lines = {line for line in lines if not any(place in line for place in NO_POINTS)}
    assert not lines, "\n".join(sorted(lines))


def unit(cp) -> AtomDiffusion:
    """The process with a network that changes nothing."""
    process = AtomDiffusion(8, SMALL.atoms, SMALL.diffusion, MemoryConfig())
    process.denoise = lambda noisy, *_: noisy
    return process


def placed(cp, coords: list[Tensor]) -> list[tuple[float, float, float]]:
    """In bf16-mixed, how far the truth of each complex, (A, 3), is from a rigid motion of it, rms and most in Angstrom;
    and the diffusion loss of the truth itself at a noise level of 0.05 Angstrom."""
    found = []
    for x in coords:
        mask, sigmas = torch.ones(1, len(x)), torch.tensor([0.05])
        feats = {"coords": x[None], "atom_pad_mask": mask, "atom_resolved_mask": mask}
        feats |= {"atom_to_token": torch.zeros_like(mask).long(), "mol_type": torch.zeros(1, 1).long()}
        with torch.autocast("cpu", BF16):
            out = unit(cp)(None, None, feats, None, 1, RandomStreams(torch.tensor([0])), cp)
        truth = out["aligned_true_atom_coords"]
        loss = diffusion_loss(x[None], truth, sigmas, feats, cp, SMALL.diffusion.sigma_data)
        error = weighted_rigid_align(x[None].double(), truth.double(), mask, mask, cp) - truth
        error = error.square().sum(-1)
        found.append((float(error.mean().sqrt()), float(error.max().sqrt()), float(loss)))
    return found


def test_the_truth_is_moved_as_a_whole(ranks):
    """Every entry of the data that comes with the package."""
    structures = [read_sample(entry)[0] for entry in open_shards(["data/shards/*.tar", "data/large/*.tar"])]
    (found,) = ranks.run(placed, 1, 1, [torch.from_numpy(x.coords[x.resolved]) for x in structures])
    for structure, (rms, most, loss) in zip(structures, found):
        print(f"{structure.meta['id']}: {len(structure.asym_id)} tokens, rms {rms:.1e}, most {most:.1e}, {loss:.1e}")
        assert rms < 3e-5 and most < 1e-4 and loss < 1e-6
    assert len(found) > 10


def perfect(cp) -> Tensor:
    """Diffusion loss of the truth itself at a noise level of 0.05 Angstrom, in bf16-mixed, of a complex of 300 A."""
    feats = dict(batch())
    x = feats["coords"] - feats["coords"][feats["atom_resolved_mask"] > 0].mean(0)
    feats["coords"] = x * 300 / (2 * x.norm(dim=-1).masked_fill(feats["atom_resolved_mask"] == 0, 0).max())
    n, samples = feats["asym_id"].shape[1], 4
    with torch.autocast("cpu", BF16):
        out = unit(cp)(None, None, feats, None, samples, RandomStreams(feats["sample_key"]), cp)
        out |= {"sigmas": torch.full((samples,), 0.05), "denoised_atom_coords": feats["coords"].expand(samples, -1, -1)}
        out |= {"pdistogram": torch.zeros(1, n, n, 1, 64), "pbfactor": torch.zeros(1, n, 64)}
        return structure_losses(out, feats, cp, SMALL.diffusion.sigma_data)["diffusion"]


def test_a_perfect_prediction_has_no_loss(ranks):
    (loss,) = ranks.run(perfect, 1, 1)
    assert loss.dtype == torch.float32 and 0 <= loss.item() < 1e-5


def loss_of_a_run(cp, sigma_data: float) -> Tensor:
    """Diffusion loss of a structure that is 1 Angstrom off, at a noise level of 2 Angstrom, as a run has it."""
    feats, module = dict(batch()), small_module(sigma_data)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp))
    n, x = feats["asym_id"].shape[1], feats["coords"]
    turn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    out = {"sigmas": torch.tensor([2.0]), "denoised_atom_coords": x + turn, "aligned_true_atom_coords": x}
    out |= {"pdistogram": torch.zeros(1, n, n, 1, 64), "pbfactor": torch.zeros(1, n, 64)}
    module.model.forward = lambda *_, **__: out
    return module._losses(feats, 0, RandomStreams(feats["sample_key"]))[1]["diffusion"]


def test_the_deviation_of_the_data_weighs_the_loss(ranks):
    """``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`` of what the configuration says."""
    (wide,), (narrow,) = (ranks.run(loss_of_a_run, 1, 1, sigma_data) for sigma_data in (16.0, 4.0))
    torch.testing.assert_close(narrow / wide, torch.tensor([((4 + 16) / 64) / ((4 + 256) / 1024)]))


def calculated(cp, mixed: bool) -> dict[str, Tensor]:
    """What the diffusion process, all losses and all scores make of the same random representations and logits."""
    generator, feats, config = torch.Generator().manual_seed(0), to_local(batch()), SMALL
    draws, n, samples = RandomStreams(feats["sample_key"]), feats["asym_id"].shape[1], 2
    model = CoFolding(config, MemoryConfig())
    randomise(model)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    trunk = {"s_inputs": normal(1, n, config.token_s), "s": normal(1, n, config.token_s)}
    trunk["z"] = normal(1, n, n, config.token_z)
    conditioning = model._condition(trunk, feats, cp)
    s_inputs, s = trunk["s_inputs"], trunk["s"]
    pairs = {name: normal(samples, n, n, 64) for name in ("pae_logits", "pde_logits")}
    logits = pairs | {"plddt_logits": normal(samples, n, 50), "resolved_logits": normal(samples, n, 2)}
    heads = {"pdistogram": cp.tiled(normal(1, n, n, 1, 64)), "pbfactor": normal(1, n, 64)}
    with torch.autocast("cpu", BF16, enabled=mixed):
        out = model.structure_module(s_inputs, s, feats, conditioning, samples, draws, cp)
        losses = structure_losses(out | heads, feats, cp, config.diffusion.sigma_data)
        coords = model.structure_module.sample(s_inputs, s, feats, conditioning, 2, samples, draws, cp)
        losses |= confidence_losses(logits, coords, feats, cp)
        scores = confidence_scores(logits, coords, to_local(heads)["pdistogram"], feats, samples, cp)
        scores["distances"] = score_distances(heads["pdistogram"], feats, cp)
        scores["structures"] = score_structures(coords[:1], feats, cp)
    (losses["diffusion"] + losses["smooth_lddt"]).sum().backward()
    gradients = {name: p.grad for name, p in model.structure_module.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in (out | {"coords": coords} | losses | scores | gradients).items()}


def test_nothing_of_the_process_changes_in_mixed_precision(ranks):
    """To the last bit: what follows the conditioning of the structure module, losses and scores, and its gradients."""
    ((mixed,), (wide,)) = (ranks.run(calculated, 1, 1, on) for on in (True, False))
    assert len(wide) > 60 and mixed.keys() == wide.keys()
    assert [name for name, x in wide.items() if not torch.equal(x, mixed[name])] == []
