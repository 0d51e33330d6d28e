"""Padding to few sizes and to aligned tiles: which sizes it gives, and that results stay the same."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from cpfold_train.config.compose import compose
from cpfold_train.data.stream import loader
from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.padding import GPU_MULTIPLE, Padding, in_buckets
from cpfold_train.data.stream.sampling import Source
from cpfold_train.parallel.grid import Grid
from cpfold_train.training.module import CoFoldingModule
from tests.parity import randomise
from tests.test_training_runs import SMALL

CONFIDENCE = ["loss.plddt=0.1", "loss.resolved=0.1", "loss.pde=0.1", "loss.pae=0.1", "diffusion.sampling_steps=2"]
SETTINGS = [*SMALL, *CONFIDENCE, "data.val=[]", "model.confidence.pairformer.pairwise_head_width=4"]
PADDED = Padding(side=5, rows=8, atoms=256)


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [(Grid(), 112), (Grid(2, 2), 128), (Grid(2, 3), 192), (Grid(3, 3), 144), (Grid(4, 4), 128)],
    ids=str,
)
def test_sides_of_tiles_are_aligned(grid, tokens):
    """And no multiple of the grid that is smaller would do."""
    n, s, a = Padding(GPU_MULTIPLE).sizes(grid, 100, 7, 800)
    assert (
        n == tokens and not n % grid.cp_size and not n // grid.rows % GPU_MULTIPLE and not n // grid.cols % GPU_MULTIPLE
    )
    smaller = [m for m in range(100, n) if not m % grid.cp_size]
    assert all(m % (grid.rows * GPU_MULTIPLE) or m % (grid.cols * GPU_MULTIPLE) for m in smaller)
    assert (s, a) == Padding().sizes(grid, 100, 7, 800)[1:] == (grid.pad_rows(7), grid.pad_atoms(800))


def test_there_are_as_many_sizes_as_buckets():
    padding = in_buckets(8, 1, 3072, 1024)
    sizes = {padding.sizes(Grid(2, 2), n, 1 + n // 4, 8 * n) for n in range(1, 3073)}
    assert {n for n, _, _ in sizes} == set(range(384, 3073, 384)) and {s for _, s, _ in sizes} == set(
        range(128, 897, 128)
    )
    assert {a for _, _, a in sizes} == set(range(3072, 8 * 3072 + 1, 3072))
    assert padding.sizes(Grid(2, 2), 3072, 1024, 25_000)[:2] == (3072, 1024)
    assert in_buckets(None, 4, 3072, 1024) == Padding(4)


def step(cp, padding: Padding) -> tuple[dict[str, Tensor], Tensor, tuple[int, ...]]:
    """This rank's parts of the losses and of the gradients of a step, and the padded sizes."""
    config = compose(SETTINGS)
    source = Source(["tests/data/*.tar"])
    batches = TileLoader([source], cp.grid, crop_size=22, max_msa_rows=5, batch_size=2, shuffle=False)
    with mock.patch.object(loader, "in_buckets", lambda *_: padding):
        batch = next(iter(batches))
    batch = {name: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for name, x in batch.items()}
    module = CoFoldingModule(config.model, config.memory, config.optim, config.loss, config.diffusion, config.seed)
    module.double()
    randomise(module)
    for parameter in module.parameters():
        parameter.data *= 0.5
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    out = module.micro_batch(batch, 1)
    out["loss"].backward()
    grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    sizes = batch["res_type"].shape[1], batch["msa"].shape[1] * cp.grid.rows, batch["coords"].shape[1] * cp.grid.cp_size
    return out["partial_losses"], grads, sizes


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_padding_changes_no_loss_and_no_gradient(ranks, grid):
    found = [ranks.run(step, *grid, padding) for padding in (Padding(), PADDED)]
    (losses, grads, sizes), (padded_losses, padded_grads, padded_sizes) = (
        (
            {name: sum(shares[name] for shares, _, _ in parts) for name in parts[0][0]},
            sum(grads for _, grads, _ in parts),
            parts[0][2],
        )
        for parts in found
    )
    assert all(more > less for more, less in zip(padded_sizes, sizes)), (sizes, padded_sizes)
    for name, loss in losses.items():
        assert loss.isfinite() and loss > 0
        torch.testing.assert_close(padded_losses[name], loss, rtol=1e-10, atol=0, msg=name)
    torch.testing.assert_close(padded_grads, grads, rtol=1e-7, atol=1e-10 * grads.abs().max().item())
