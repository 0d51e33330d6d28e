"""How large the phases are: on a GPU as they matter there, on a CPU so that all of them run within seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cpfold_train.config.schema import CONFIDENCE
from cpfold_train.kernels.choice import is_installed
from cpfold_train.model.config import (
    AtomConfig,
    ConfidenceConfig,
    DiffusionConfig,
    ModelConfig,
    MSAConfig,
    PairformerConfig,
    TemplateConfig,
)
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import ATOMS_PER_TOKEN, Sizes
from cpfold_train.testing.cases import CASES

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
"""Dtype of z and m by precision. In the last two, products run under autocast to bf16."""


@dataclass(frozen=True)
class Scope:
    """What is run.

    Attributes:
        device: type, ``cuda`` or ``cpu``.
        model: widths of the blocks.
        block_tokens, block_rows: N and S of a block on the grid that is simulated.
        stock_tokens: N of a block on one rank beside the stock package's, which holds all scores of attention.
        exact_tokens: N of a block whose errors are compared with fp64.
        cases: of the comparison with 1x1 on the CPU.
        step: settings of the training step.
        step_tokens: crops among which the planner's largest is looked for.
        edge: rows of the square matrices whose product is timed.
        stream_bytes: size of the tensor that is copied.
        repeats: timed calls, of which the median counts.
    """

    device: str
    model: ModelConfig
    block_tokens: int
    block_rows: int
    stock_tokens: int
    exact_tokens: int
    cases: tuple[str, ...]
    step: tuple[str, ...]
    step_tokens: tuple[int, ...]
    edge: int
    stream_bytes: int
    repeats: int

    def backends(self) -> tuple[str, ...]:
        """Kernels that run here, those of torch last: they take longest."""
        fast = ("triton", "cuequivariance") if self.device == "cuda" else ()
        return (*(name for name in fast if is_installed(name)), "torch")

    def sizes(self, tokens: int, grid: Grid) -> Sizes:
        """Of the inputs of a block, padded for a grid."""
        atoms = grid.pad_atoms(int(ATOMS_PER_TOKEN * tokens))
        return Sizes(grid.pad_tokens(tokens), grid.pad_rows(self.block_rows), atoms, samples=1)


STEP = ("model=boltz2", "trainer.precision=bf16-mixed", "cp.grid=1x1", "data.max_msa_rows=1024")
STEP += ("diffusion.multiplicity=16", *(f"loss.{name}=1e-4" for name in CONFIDENCE))
"""As ``recipe=finetune_boltz2_large_crop``, on one GPU."""

ON_GPU = Scope(
    device="cuda",
    model=ModelConfig(),
    block_tokens=3072,
    block_rows=1024,
    stock_tokens=768,
    exact_tokens=128,
    cases=tuple(CASES),
    step=STEP,
    step_tokens=tuple(range(256, 4097, 128)),
    edge=8192,
    stream_bytes=4 << 30,
    repeats=5,
)

_SMALL = PairformerConfig(1, 2, 0.0, 16, 2)
ON_CPU = replace(
    ON_GPU,
    device="cpu",
    model=ModelConfig(
        token_s=32,
        token_z=16,
        recycling_steps=0,
        msa=MSAConfig(16, 1, 0.0, 0.0, 16, 2),
        pairformer=_SMALL,
        atoms=AtomConfig(8, 4, 1, 2, 1, 2),
        diffusion=DiffusionConfig(token_transformer_depth=1, token_transformer_heads=2),
        template=TemplateConfig(8, 1, 0.0, 16, 2),
        confidence=ConfidenceConfig(_SMALL),
    ),
    block_tokens=48,
    block_rows=8,
    stock_tokens=24,
    exact_tokens=16,
    cases=("pairformer block", "TriangleAttentionEndingNode, ring", "atoms to tokens", "training step"),
    step=(*STEP, "data.max_msa_rows=8", "diffusion.multiplicity=1", *(f"loss.{name}=0" for name in CONFIDENCE)),
    step_tokens=(16,),
    edge=128,
    stream_bytes=1 << 20,
    repeats=1,
)
