"""What TF32 does to the gradients of a training step, beside what bf16-mixed does: why ``tf32`` is false by default."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpfold_train.config.compose import compose
from cpfold_train.config.schema import TrainConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.testing.step_case import SETTINGS
from cpfold_train.training.module import CoFoldingModule
from tests.parity import randomise
from tests.tf32 import Tf32, points_as_on_gpus, rounded

SIZES = ("model.token_s=32", "model.token_z=16", "model.pairformer.num_blocks=2", "diffusion.multiplicity=8")
LOW_NOISE = ("model.diffusion.P_mean=-6", "model.diffusion.P_std=0.0")
"""All samples at a noise level of 0.04 Angstrom."""
RUNS = {
    "fp32": ("32-true", None),
    "fp32, TF32": ("32-true", True),
    "bf16-mixed": ("bf16-mixed", None),
    "bf16-mixed, TF32": ("bf16-mixed", True),
    "bf16-mixed, TF32 cut off": ("bf16-mixed", False),
}
"""Precision, and whether TF32 is the nearest number, or what is left where the other bits are cut off."""
LAYERS = {
    "trunk, pairs and MSA": lambda name: name.startswith("trunk.") and not single(name),
    "single track of the trunk": lambda name: name.startswith("trunk.") and single(name),
    "biases and conditioning of the diffusion": lambda name: name.startswith("diffusion_conditioning."),
    "diffusion, single conditioning": lambda name: ".single_conditioner." in name or ".s_to_a_linear." in name,
    "diffusion, tokens": lambda name: ".token_transformer." in name or ".a_norm." in name,
    "diffusion, atoms": lambda name: name.startswith("structure_module.") and "atom_attention" in name,
    "confidence": lambda name: name.startswith("confidence_module."),
}
ISLANDS = tuple(layer for layer in LAYERS if layer.startswith(("biases", "diffusion")))
"""All of whose products are in fp32 in bf16-mixed."""

Gradient = dict[str, Tensor]


def single(name: str) -> bool:
    return any(part in name for part in (".attention.", "pre_norm_s", "transition_s", "s_init", "s_norm", "s_recycle"))


def module_of(config: TrainConfig, cp) -> CoFoldingModule:
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    return module


def trained(config: TrainConfig, cp, batch: dict, steps: int) -> dict[str, Tensor]:
    """Weights after so many steps on one complex; of none, random ones."""
    module = module_of(config, cp)
    if not steps:
        randomise(module)
        return {name: 0.3 * x if x.is_floating_point() else x for name, x in module.state_dict().items()}
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        module.micro_batch(batch | {"sample_key": torch.tensor([step])}, 1)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 10)
        optimizer.step()
    return module.state_dict()


def compared(cp, settings: tuple[str, ...], steps: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Relative error of the gradient of each of the layers in each of the runs, and of the diffusion loss."""
    config = compose([*SETTINGS, *SIZES, *settings])
    (batch,) = batches_of_data(config, Grid(), 1)
    weights = trained(config, cp, batch, steps)

    def step(precision: str, nearest: bool | None) -> tuple[Gradient, Tensor]:
        module = module_of(config, cp)
        module.load_state_dict(weights)
        module = module.double() if precision == "64-true" else module
        with points_as_on_gpus(), nullcontext() if nearest is None else Tf32(nearest) as tf32:
            with torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed"):
                found = module.micro_batch(batch, 1)
            found["loss"].backward()
        assert nearest is None or tf32.products > 500
        gradient = {name: p.grad.double() for name, p in module.model.named_parameters() if p.grad is not None}
        return gradient, found["partial_losses"]["diffusion"].double()

    exact, exact_loss = step("64-true", None)
    errors, losses = {layer: {} for layer in LAYERS}, {}
    for run, how in RUNS.items():
        gradient, loss = step(*how)
        losses[run] = float(abs(loss / exact_loss - 1))
        for layer, is_of in LAYERS.items():
            errors[layer][run] = error(gradient, exact, is_of)
    return errors, losses


def error(gradient: Gradient, exact: Gradient, is_of: Callable[[str], bool]) -> float:
    pairs = [(gradient[name], x) for name, x in exact.items() if is_of(name)]
    wrong = sum(float((found - right).square().sum()) for found, right in pairs)
    norm = sum(float(right.square().sum()) for _, right in pairs)
    return (wrong / norm) ** 0.5


@pytest.mark.parametrize("noise", [(), LOW_NOISE], ids=["noise", "low_noise"])
@pytest.mark.parametrize("steps", [0, pytest.param(400, marks=pytest.mark.slow)])
def test_tf32_is_not_small_beside_bf16_mixed(ranks, noise, steps):
    """Where products are in fp32 in bf16-mixed. If it were, it could be the default there."""
    ((errors, losses),) = ranks.run(compared, 1, 1, noise, steps)
    print(f"\n{steps} steps{', low noise' if noise else ''}: {', '.join(RUNS)}")
    for name, found in (*errors.items(), ("loss of the diffusion", losses)):
        print(f"| {name} | {' | '.join(f'{found[run]:.1e}' for run in RUNS)} |")
    assert all(found["fp32"] < 2e-4 for found in errors.values())
    # What it costs is no more than bf16 costs somewhere.
    most = max(found["bf16-mixed"] for found in errors.values())
    assert all(1e-5 < found["fp32, TF32"] < most for found in errors.values())
    for tf32, least in (("fp32, TF32", 0.3), ("bf16-mixed, TF32 cut off", 2)):
        assert max(errors[layer][tf32] / errors[layer]["bf16-mixed"] for layer in ISLANDS) > least


def test_rounding():
    """Ten bits: half the last one at most, or all of it."""
    x = torch.randn(10000)
    for nearest, most in ((True, 2.0**-11), (False, 2.0**-10)):
        found = rounded(x, nearest)
        assert torch.equal(found, rounded(found, nearest))
        assert 0.9 * most < float((found / x - 1).abs().max()) <= most
    assert bool((rounded(x, False).abs() <= x.abs()).all())
