"""Metrics against dense references, the schedule, the groups of parameters, the average and the file of metrics."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from cpfold_train.config.schema import WandbConfig
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.training import validation_metrics as metrics
from cpfold_train.training.ema import MovingAverage, average_decay
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.optim import parameter_groups, warmup_then_steps
from cpfold_train.training.reporting.loggers import MetricsCSV, wandb_logger
from tests.golden.case import CONFIG, DRAWN, OPTIM, WEIGHTS

N = 60


@pytest.fixture
def sample():
    """Two chains of 30 residues with a gap in the numbering, some unresolved, and logits for their distances."""
    rng = torch.Generator().manual_seed(0)
    centre = torch.randn(N, 3, generator=rng, dtype=torch.float64).cumsum(0) * 2
    resolved = torch.rand(N, generator=rng) > 0.1
    asym_id = torch.arange(N) // 30
    residue_index = torch.arange(N) % 30 + 10 * (torch.arange(N) % 30 > 20)
    logits = torch.randn(N, N, 64, generator=rng, dtype=torch.float64)
    return centre, resolved, asym_id, residue_index, logits + logits.transpose(0, 1)


def test_distogram_reading():
    logits = torch.full((70, 2, 64), -1e9)
    logits[:, 0, 0] = 0
    logits[:, 1, 30] = 0
    expected, contact = metrics.read_distogram(logits)
    width = 20 / 62
    assert expected[:, 0].tolist() == pytest.approx([2 - width / 2] * 70)
    assert expected[:, 1].tolist() == pytest.approx([2 + 29.5 * width] * 70)
    assert contact[0].tolist() == [1, 0]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_scores_of_tiles_are_those_of_the_whole(sample, grid):
    centre, resolved, asym_id, residue_index, logits = sample
    top, parts, candidates = int(resolved.sum()), torch.zeros(2, dtype=torch.float64), []
    for rank in range(grid[0] * grid[1]):
        place = Grid(*grid, rank=rank)
        rows, cols = place.row_tokens(N), place.col_tokens(N)
        tile = logits[slice(*rows), slice(*cols)]
        expected, contact = metrics.read_distogram(tile)
        distance, valid = metrics.true_distances(centre, resolved, rows, cols)
        parts += metrics.lddt_parts(expected, distance, valid)
        far = valid & metrics.long_range(asym_id, residue_index, rows, cols)
        candidates.append(metrics.contact_candidates(contact, distance, far, top, rows, cols, N))
    lddt = parts[0] / parts[1]
    precision = metrics.precision(torch.cat(candidates), top)

    scores, ranked = [], []
    p = logits.softmax(-1).numpy()
    centres = np.linspace(2 - 10 / 62, 22 + 10 / 62, 64)
    for i in range(N):
        for j in range(N):
            if i == j or not (resolved[i] and resolved[j]):
                continue
            true = float((centre[i] - centre[j]).norm())
            if true < 15:
                error = abs(p[i, j] @ centres - true)
                scores.append(np.mean([error < t for t in (0.5, 1, 2, 4)]))
            if i < j and (asym_id[i] != asym_id[j] or abs(int(residue_index[i] - residue_index[j])) >= 24):
                ranked.append((p[i, j][centres < 8].sum(), true < 8))
    ranked.sort(reverse=True)
    assert 0 < np.mean(scores) < 1
    assert float(lddt) == pytest.approx(np.mean(scores), abs=1e-12)
    assert float(precision) == pytest.approx(np.mean([hit for _, hit in ranked[:top]]), abs=1e-12)


def test_precision_without_candidates():
    assert metrics.precision(torch.tensor([[-1.0, 0.0]]), 3).isnan()


def test_schedule():
    factor = warmup_then_steps(1000, 0.95, 50_000)
    assert factor(0) == pytest.approx(1e-3)
    assert factor(499) == pytest.approx(0.5)
    assert factor(49_999) == 1
    assert factor(100_000) == pytest.approx(0.95**2)


def test_decay_goes_by_the_type_of_the_module():
    model = nn.ModuleDict({"norm_like": nn.Linear(2, 3), "out": nn.LayerNorm(3), "table": nn.Embedding(4, 3)})
    frozen = nn.Linear(2, 2).requires_grad_(False)
    decayed, plain = parameter_groups(nn.Sequential(*model.values(), frozen), 0.1)
    assert [p.shape for p in decayed["params"]] == [(3, 2)]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0


def test_average_forgets_its_start_fast():
    for n in (1, 10, 100_000):
        assert average_decay(n, 0.999) == min(0.999, (1 + n) / (10 + n))
    assert average_decay(0, 0.999) == 0


def test_average_is_wider_than_the_weights_and_returns_them():
    """Weights in bf16 that move by less than it can tell, a frozen one, and one under two names."""
    module = pl.LightningModule()
    module.a, module.b = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), nn.Linear(1, 1, bias=False)
    module.also = nn.Sequential(module.a)
    module.b.requires_grad_(False)
    average = MovingAverage(0.999)
    nn.init.ones_(module.a.weight)
    average.on_fit_start(None, module)
    expected = 0.0
    for n, value in enumerate((1.0, 1.0078125, 1.015625)):
        nn.init.constant_(module.a.weight, value)
        average.on_train_batch_end(SimpleNamespace(global_step=n + 1), module, None, None, n)
        decay = average_decay(n, 0.999)
        expected = decay * expected + (1 - decay) * value
    checkpoint = {"state_dict": copy.deepcopy(module.state_dict())}
    average.on_save_checkpoint(None, module, checkpoint)
    for name in ("a.weight", "also.0.weight"):
        assert checkpoint["state_dict"][name].item() == pytest.approx(expected, rel=1e-6)
        assert checkpoint["current_model_state"][name].item() == 1.015625
    assert checkpoint["state_dict"]["b.weight"].item() == module.b.weight.item()

    average.on_validation_epoch_start(None, module)
    assert module.a.weight.item() == torch.tensor(expected).bfloat16().item()
    average.on_validation_epoch_end(None, module)
    assert module.a.weight.item() == 1.015625

    resumed = MovingAverage(0.999)
    nn.init.zeros_(module.a.weight)
    resumed.on_load_checkpoint(None, module, checkpoint)
    resumed.on_fit_start(None, module)
    assert module.a.weight.item() == 1.015625
    again = {"state_dict": module.state_dict()}
    resumed.on_save_checkpoint(None, module, again)
    assert again["state_dict"]["a.weight"].item() == checkpoint["state_dict"]["a.weight"].item()
    assert again["averaging_state"]["n_averaged"] == 3


def test_average_takes_a_step_in_once_however_many_micro_batches_it_has():
    module = pl.LightningModule()
    module.a = nn.Linear(1, 1, bias=False)
    average = MovingAverage(0.9)
    average.on_fit_start(None, module)
    found = []
    for batch, (step, value) in enumerate([(0, 5.0), (0, 6.0), (1, 1.0), (1, 7.0), (1, 8.0), (2, 2.0)]):
        nn.init.constant_(module.a.weight, value)
        average.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, batch)
        found.append(average._average["a.weight"].item())
    weight = 1 - average_decay(1, 0.9)
    assert found[2:] == pytest.approx([1, 1, 1, 1 + weight])


def test_validation_has_the_average_and_training_goes_on_from_its_own_weights():
    module = pl.LightningModule()
    module.a = nn.Linear(1, 1, bias=False)
    average = MovingAverage(0.9)
    average.on_fit_start(None, module)
    for step, value in enumerate((1.0, 9.0), start=1):
        nn.init.constant_(module.a.weight, value)
        average.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, step)
    average.on_validation_epoch_start(None, module)
    assert module.a.weight.item() == pytest.approx(1 + 8 * (1 - average_decay(1, 0.9)))
    average.on_validation_epoch_end(None, module)
    assert module.a.weight.item() == 9


def recycling_drawn(seed: int, steps: int, most: int) -> list[int]:
    """Recycling steps of the first micro-batch of each optimizer step."""
    drawn = []
    model = replace(CONFIG, recycling_steps=most)
    module = CoFoldingModule(model, MemoryConfig(), OPTIM, WEIGHTS, DRAWN, seed)
    module.micro_batch = lambda batch, recycling: drawn.append(recycling) or {}
    module._flops = lambda batch, recycling: 0.0
    for step in range(steps):
        module._trainer = SimpleNamespace(global_step=step)
        module.training_step({}, 0)
    return drawn


def test_recycling_is_drawn_evenly_from_none_to_the_most():
    drawn = recycling_drawn(3, 400, 3)
    assert [abs(drawn.count(k) - 100) < 30 for k in range(4)] == [True] * 4
    assert len({*pairwise(drawn)}) == 16, "one step tells what the next one draws"
    assert recycling_drawn(3, 50, 3) == drawn[:50] != recycling_drawn(4, 50, 3)


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step), "comm/x": 1.0}, step)
    first.log_metrics({"val/loss": 0.1}, 3)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert (rows[2]["train/loss"], rows[2]["val/loss"]) == ("3.0", "0.1")

    resumed = MetricsCSV(path)
    resumed.log_metrics({"train/loss": 9.0}, 2)
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [("1", "1.0"), ("2", "9.0")]

    amid_step = MetricsCSV(path)
    amid_step.log_metrics({"val/loss": 0.2}, 2)
    amid_step.log_metrics({"train/loss": 8.0}, 3)
    rows = [(row["train/loss"], row["val/loss"]) for row in read_metrics(path)]
    assert rows == [("1.0", ""), ("9.0", "0.2"), ("8.0", "")]


def test_a_resumed_run_is_the_same_one_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")

    def begun(resumes: bool) -> str:
        return wandb_logger(WandbConfig(True, "p", None, None), tmp_path, {}, resumes)._wandb_init["id"]

    first = begun(resumes=True)
    assert first and begun(resumes=True) == first
    assert begun(resumes=False) != first
