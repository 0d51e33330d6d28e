"""What bf16 does to a step, what it must not touch, and sums over many parts, which keep their precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpfold_train.kernels.by_rows import by_rows
from cpfold_train.losses.total import structure_losses
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
from cpfold_train.ops import outer_product_mean as opm
from cpfold_train.ops.shards import gather_shards
from cpfold_train.parallel.context import to_local
from cpfold_train.testing.trunk_cases import draws, features
from cpfold_train.training.apply import set_width
from tests.parity import randomise

BF16, FP32 = torch.bfloat16, torch.float32
C_Z = 32
BLOCKS = PairformerConfig(2, 4, 0.25, 8, 2)
SMALL = ModelConfig(
    token_s=16,
    token_z=C_Z,
    msa=MSAConfig(8, 1, 0.15, 0.25, 8, 2),
    pairformer=BLOCKS,
    atoms=AtomConfig(16, 8, 1, 2, 1, 2),
    diffusion=DiffusionConfig(token_transformer_depth=1, token_transformer_heads=2, dim_fourier=16),
    template=TemplateConfig(8, 1, 0.25, 4, 2),
    confidence=ConfidenceConfig(BLOCKS),
)
ISLANDS = ("structure_module", "atom_encoder.", "pre_norm_s", ".attention", "transition_s")
"""What of the names of modules says that they compute in fp32; the encoder of atoms is followed by its attention."""


def in_fp32(name: str) -> bool:
    return (
        any(island in f"{name}." for island in ISLANDS) and "atom_attention_encoder" not in name.split("structure")[0]
    )


def step(cp, precision: str) -> dict[str, Tensor]:
    """Losses and gradient of a step of the whole model, and how wide what it held was."""
    model = CoFolding(SMALL, MemoryConfig(recompute=False))
    randomise(model)
    for parameter in model.parameters():
        parameter.data *= 0.3
    seen = watch_islands(model)
    set_width(model, precision)
    feats = {name: x.float() if x.dtype == torch.float64 else x for name, x in features(cp.grid).items()}
    feats |= {
        "coords": 5 * feats["ref_pos"],
        "atom_resolved_mask": feats["atom_pad_mask"],
        "bfactor": 30 * feats["atom_pad_mask"],
        "token_to_rep_atom": torch.from_numpy(feats["token_atom_start"][:, :-1].clip(max=100)),
    }
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks, torch.autocast("cpu", BF16, enabled=precision != "32-true"):
        out = model(feats, cp, recycling_steps=1, multiplicity=2, draws=draws())
        losses = structure_losses(out, feats, cp, SMALL.diffusion.sigma_data)
    out = to_local(out)
    sum(loss.sum() for loss in losses.values()).backward()
    return {
        "losses": torch.stack([loss.detach() for loss in losses.values()]),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        "dtypes": {name: out[name].dtype for name in ("s", "z", "denoised_atom_coords")},
        "kept_tiles": sum(x.dtype == FP32 and is_tile(x, out["z"]) for x in kept),
        "seen": seen,
    }


def is_tile(x: Tensor, z: Tensor) -> bool:
    """Whether it has the channels of all pairs, flattened or not."""
    pairs = z.shape[0] * z.shape[1] * z.shape[2]
    return x.numel() >= z.numel() and (x.shape[:3] == z.shape[:3] or x.shape[0] == pairs)


def watch_islands(model: nn.Module) -> dict[str, bool]:
    """Filled with the modules of the islands that were called, and whether all they got and gave was in fp32."""
    seen: dict[str, bool] = {}

    def look(name: str, given: tuple, made: Tensor) -> None:
        tensors = [x for x in (*given, made) if isinstance(x, Tensor)]
        seen[name] = not torch.is_autocast_enabled("cpu") and all(x.dtype == FP32 for x in tensors)

    for name, module in model.named_modules():
        # The outermost module of an island begins it inside its own forward pass.
        if in_fp32(name) and (in_fp32(name.rpartition(".")[0]) or not any(module.children())):
            module.register_forward_hook(lambda _, given, made, name=name: look(name, given, made))
    return seen


@pytest.fixture(scope="module")
def steps(ranks):
    return {precision: ranks.run(step, 1, 1, precision)[0] for precision in ("32-true", "bf16-mixed", "bf16-true")}


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_step_in_bf16(steps, precision):
    """Within bf16's rounding, 2 ** -9, of fp32: losses well within, gradients by the layers that they came through."""
    found, expected = steps[precision], steps["32-true"]
    assert 0 < error(found["losses"], expected["losses"]) < 2e-3
    assert 0 < error(found["gradient"], expected["gradient"]) < 0.02
    assert found["dtypes"] == {
        "s": FP32, "z": BF16 if precision == "bf16-true" else FP32, "denoised_atom_coords": FP32
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_islands_stay_in_fp32(steps, precision):
    seen = steps[precision]["seen"]
    assert len(seen) > 40
    assert [name for name, wide in seen.items() if not wide] == []


def test_bf16_true_holds_no_pairs_in_fp32(steps):
    assert steps["bf16-mixed"]["kept_tiles"] > 10
    assert steps["bf16-true"]["kept_tiles"] == 0


def test_the_grid_changes_a_step_in_bf16_by_rounding_only(ranks, steps):
    parts, expected = ranks.run(step, 2, 2, "bf16-true"), steps["bf16-true"]
    assert error(sum(part["losses"] for part in parts), expected["losses"]) < 2e-3
    assert error(sum(part["gradient"] for part in parts), expected["gradient"]) < 0.02


def test_gradient_of_a_shared_bf16_tensor_is_summed_in_fp32():
    x = torch.ones(1, 768, 1, dtype=BF16)
    shared = torch.ones(1, dtype=BF16, requires_grad=True)
    by_rows(lambda x, w: x * w, 1, (x,), (shared,)).sum().backward()
    assert shared.grad.dtype == BF16 and shared.grad.item() == 768


def pieces(cp):
    """The outer product mean of 768 sequences that come one by one."""
    m, count = torch.ones(1, 768, 1, 1, dtype=BF16), torch.ones(1, 1, 1)
    before, opm.GATHERED_BYTES = opm.GATHERED_BYTES, 1
    try:
        return opm.outer_product_mean(m, m, count, torch.ones(1, 1, dtype=BF16), torch.zeros(1, dtype=BF16), cp)
    finally:
        opm.GATHERED_BYTES = before


def test_pieces_that_come_in_turn_are_summed_in_fp32(ranks):
    (out,) = ranks.run(pieces, 1, 1)
    assert out.dtype == BF16 and out.item() == 768


def gradient_from_all_ranks(cp):
    """What nine ranks find for the shard of the first one: 256 and eight ones. In bf16, 256 + 1 is 256."""
    x = torch.zeros(1, 1, dtype=BF16, requires_grad=True)
    everything = gather_shards(x, cp, "test")
    (everything[:, 0] * (256 if cp.all.index == 0 else 1)).sum().backward()
    return x.grad


def test_gradients_of_several_ranks_are_summed_in_fp32(ranks):
    first, *_ = ranks.run(gradient_from_all_ranks, 3, 3)
    assert first.dtype == BF16 and first.item() == 264
