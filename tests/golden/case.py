"""A whole training step on crops of real entries, small and in fp64: the case of golden values and of comparisons.

Trunk with one recycling, sampled structures, noised copies and their denoising, distogram, b-factors, confidences, all
losses with Boltz-2's weights, and the backward pass.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from cpfold_train.checkpoints.boltz import boltz_name
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
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams, key_of
from cpfold_train.training.module import CoFoldingModule

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


def weights() -> dict[str, Tensor]:
    """Weights of a model of which none is zero and none saturates: many start at zero, and zeros hide errors.

    A formula of the name and the position alone, which every version of torch computes alike.
    """
    model = CoFolding(CONFIG, MemoryConfig())
    with torch.no_grad():
        for name, x in model.named_parameters():
            draws = RandomStreams(torch.tensor([key_of("weight", boltz_name(name))]))
            # Evenly spread, with a standard deviation of one.
            spread = (2 * draws.uniform(0, x.numel()).view(x.shape) - 1) * 3**0.5
            if x.ndim > 1:
                x.copy_(spread * 0.6 * x.shape[1] ** -0.5)
            else:
                x.copy_(spread * 0.3 + ("norm" in name and name.endswith("weight")))
    return model.state_dict()


def our_step(cp, state: dict[str, Tensor], dtype: torch.dtype) -> dict:
    """This rank's part of the losses, of the gradients, of the structures that each step of sampling starts from and
    the last one ends with, (STEPS + 1, B, STRUCTURES, A/P, 3), and of the truth of each sampled structure."""
    # All is kept for the backward pass: tests/test_parity.py has what is recomputed.
    module = CoFoldingModule(CONFIG, MemoryConfig(recompute=False), OPTIM, WEIGHTS, DRAWN, SEED)
    module.model.load_state_dict(state)
    module = module.to(dtype).train()
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    found, sampled, matched = {}, [], total.matched_truth
    denoise, sample = module.model.structure_module.denoise, module.model.sample

    def noted(*args):
        found["truth"] = matched(*args)
        return found["truth"]

    def denoise_noted(noisy, *args):
        # Without gradients structures are sampled; with them copies of the truth are denoised.
        if not torch.is_grad_enabled():
            sampled.append(noisy)
        return denoise(noisy, *args)

    def sample_noted(*args, **kwargs):
        coords = sample(*args, **kwargs)
        sampled.append(coords)
        return coords

    module.model.structure_module.denoise, module.model.sample = denoise_noted, sample_noted
    total.matched_truth = noted
    try:
        step = module.training_step(features(crops(), cp.grid, dtype), 0)
    finally:
        total.matched_truth = matched
    step["loss"].backward()
    size = cp.grid.cp_size
    grads = {boltz_name(name): p.grad / size for name, p in module.model.named_parameters() if p.grad is not None}
    trajectory = torch.stack(sampled).unflatten(1, (-1, STRUCTURES))
    return {"losses": step["partial_losses"], "grads": grads, "trajectory": trajectory, **found}
