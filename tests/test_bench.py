"""The benchmark: what it counts is what the formulas say, and a simulated rank counts what a real one does."""

from __future__ import annotations

import json
import multiprocessing as mp
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from cpfold_train.__main__ import main
from cpfold_train.cli import bench as command
from cpfold_train.model.config import (
    AtomConfig,
    ConfidenceConfig,
    DiffusionConfig,
    ModelConfig,
    MSAConfig,
    PairformerConfig,
    TemplateConfig,
)
from cpfold_train.parallel.cost import choose, triangle_attention_cost, triangle_multiplication_cost
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import Sizes
from cpfold_train.simulate.bench.cases import CASES
from cpfold_train.simulate.bench.inputs import make_features, make_inputs, precision, randomise
from cpfold_train.simulate.bench.simulate import simulate

PAIRFORMER = PairformerConfig(1, 4, 0.0, 8, 2)
CONFIG = ModelConfig(
    token_s=32,
    token_z=24,
    num_bins=8,
    msa=MSAConfig(16, 1, 0.0, 0.0, 8, 2),
    pairformer=PAIRFORMER,
    atoms=AtomConfig(8, 4, 1, 2, 1, 2),
    diffusion=DiffusionConfig(token_transformer_depth=2, token_transformer_heads=2, dim_fourier=8),
    template=TemplateConfig(8, 1, 0.0, 4, 2),
    confidence=ConfidenceConfig(PAIRFORMER, num_dist_bins=8, num_plddt_bins=5, num_pde_bins=6, num_pae_bins=7),
)
N = 36
SIZES = Sizes(N, msa_depth=12, atoms=384, samples=2)


def sent(cp, op, config=CONFIG):
    """Bytes that this rank sends in one forward and backward, and the sum of its gradients' sizes."""
    case = CASES[op]
    module = case.build(config)
    randomise(module)
    x = make_features(case.inputs, SIZES, cp.grid, torch.device("cpu"))
    x |= make_inputs(case.inputs, config, SIZES, cp.grid, torch.float32, torch.device("cpu"))
    out = case.call(module, x, cp)
    torch.autograd.backward(out, [torch.ones_like(part) for part in out])
    return cp.ledger.total().sent_bytes


def simulate_elsewhere(*arguments):
    """A simulated world wants a process of its own, and autograd one that is not forked off where it has run."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(simulate, arguments)


@pytest.mark.parametrize("op", CASES)
def test_simulated_rank_sends_what_a_real_one_sends(ranks, op):
    real = ranks.run(sent, 2, 3, op)
    found = simulate_elsewhere(op, CONFIG, SIZES, Grid(2, 3, 1, 3), torch.float32, "auto")
    assert found["sent_bytes"] == real[3]
    assert (real[3] > 0) == (op != "transition")


def booked(cp, op, algorithm, config):
    """Bytes and messages of the triangle op on this rank."""
    cp.algorithm = algorithm
    sent(cp, op, config)
    total = cp.ledger.total()
    return total.sent_bytes, total.messages


@pytest.mark.parametrize("grid", [(1, 2), (3, 1), (2, 2), (2, 3), (3, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("algorithm", ["alltoall", "ring"])
@pytest.mark.parametrize("c", [24, 9])
def test_cost_model_is_what_the_ledger_books(ranks, grid, algorithm, c):
    """With 9 channels the bias is large: it comes in chunks of heads, or rows have replicas."""
    place, tile, config = Grid(*grid), N * N // (grid[0] * grid[1]) * c * 4, replace(CONFIG, token_z=c)
    sizes = N, c, CONFIG.pairformer.pairwise_num_heads, 16, algorithm
    costs = {
        "triangle_multiplication": triangle_multiplication_cost(place, c, algorithm),
        "triangle_attention_start": triangle_attention_cost(place, *sizes),
        "triangle_attention_end": triangle_attention_cost(place.transposed(), *sizes),
    }
    for op, cost in costs.items():
        booked_bytes, messages = zip(*ranks.run(booked, *grid, op, algorithm, config))
        assert sum(booked_bytes) / place.cp_size == pytest.approx(cost.sent * tile), op
        assert sum(messages) / place.cp_size == pytest.approx(cost.messages), op


def test_auto_takes_the_cheaper_way():
    boltz, many = Grid(2, 2), Grid(32, 32)

    def multiplication(grid, algorithm, c=128):
        costs = (triangle_multiplication_cost(grid, c, way) for way in ("ring", "alltoall"))
        return choose(algorithm, *costs, tile_bytes=1 << 20)

    assert multiplication(boltz, "auto") == multiplication(many, "alltoall") == "alltoall"
    assert multiplication(boltz, "ring") == "ring"
    # A thousand ranks and 128 channels: most would hold nothing and some a whole channel.
    assert multiplication(many, "auto") == "ring"


@pytest.mark.parametrize("op", ["triangle_multiplication", "confidence_losses"])
def test_memory_falls_with_the_number_of_ranks(op):
    config = replace(CONFIG, token_z=64, confidence=ConfidenceConfig(PAIRFORMER))
    sizes, peaks = Sizes(768, msa_depth=4, atoms=1536, samples=1), []
    for side in (2, 4):
        peaks.append(simulate_elsewhere(op, config, sizes, Grid(side, side), torch.float32, "auto")["peak_bytes"])
    # The blocks of rows are of one size on any grid; what is left falls as 1 / P.
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_command_prints_one_json_object(capfd):
    assert (
        main(["bench", "transition", "--n", "32", "--token-z", "16", "--grid", "1x2", "--repeats", "1", "--json"]) == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["grid"] == "1x2" and len(result["peak_mib_per_rank"]) == 2
    assert {"wall_s", "cpu_s_total", "sent_mib_per_rank", "sent_tiles", "exposed_comm_s", "machine"} <= result.keys()


@pytest.mark.parametrize("op", ["pairformer_block", "diffusion_module"])
def test_bf16_keeps_the_islands_of_fp32(ranks, op):
    """As in training: s and the diffusion stay in fp32, z is in bf16, and weights are in fp32."""
    assert ranks.run(in_bf16, 1, 1, op) == [{"s": torch.float32, "z": torch.bfloat16, "weights": {torch.float32}}]


def in_bf16(cp, op) -> dict:
    case, device = CASES[op], torch.device("cpu")
    weights, mixed = precision(torch.bfloat16, device)
    module = case.build(CONFIG).to(weights)
    x = make_features(case.inputs, SIZES, cp.grid, device)
    x |= make_inputs(case.inputs, CONFIG, SIZES, cp.grid, torch.bfloat16, device)
    with mixed:
        out = case.call(module, x, cp)
    # The single track of a block, and denoised coordinates.
    assert out[0].dtype == torch.float32
    return {"s": x["s"].dtype, "z": x["z"].dtype, "weights": {p.dtype for p in module.parameters()}}


class StandIn(torch.nn.Module):
    """For a transition of the package, which is not installed: it tells how it was called."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim, dim))

    def forward(self, z):
        self.seen = z.dtype, self.weight.dtype, torch.is_autocast_enabled(z.device.type), z.device.type
        return z @ self.weight


def test_the_package_runs_where_we_run(monkeypatch, tmp_path):
    layers = "attentionv2 outer_product_mean pair_averaging pairformer transition triangular_attention triangular_mult"
    paths = ["layers", "modules", "modules.trunkv2", "layers.triangular_attention.attention"]
    for path in ("boltz", "boltz.model", *(f"boltz.model.{path}" for path in paths)):
        monkeypatch.setitem(sys.modules, path, MagicMock())
    for layer in layers.split():
        monkeypatch.setitem(sys.modules, f"boltz.model.layers.{layer}", MagicMock())
    stock = runpy.run_module("cpfold_train.simulate.bench.stock")
    module = StandIn(8, 32)
    stock["CASES"]["transition"] = (lambda widths: module), stock["CASES"]["transition"][1]
    widths = {"token_s": 4, "token_z": 8, "msa_s": 4}
    stock["stock_step"]("transition", widths, 6, 2, torch.bfloat16, torch.device("cpu"), module.state_dict())()
    assert module.seen == (torch.bfloat16, torch.float32, True, "cpu")
    given = {}

    def run(arguments, **_):
        given.update(torch.load(arguments[3], weights_only=True))
        torch.save({"wall_s": 1.0, "cpu_s": 1.0, "peak_mib": 1.0}, arguments[4])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", run)
    own = {"op": "transition", "token_z": 8, "repeats": 1, "dtype": "bf16", "device": "cuda"}
    torch.save({}, tmp_path / "state.pt")
    command._stock(SimpleNamespace(**own, boltz_threads=1, boltz_python="python"), str(tmp_path), SIZES)
    assert given["device"] == "cuda" and given["dtype"] == torch.bfloat16


def test_refusals(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["bench", "transition", "--grid", "2x"]) == 2
    assert "2x2" in capsys.readouterr().err
    assert main(["bench", "transition", "--grid", "2x2", "--world", "6"]) == 2
    assert "--world 4" in capsys.readouterr().err
    assert main(["bench", "transition", "--world", "4", "--rank", "4"]) == 2
    assert "--world P" in capsys.readouterr().err
    assert main(["bench", "transition", "--kernels", "triton"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    assert main(["bench", "smooth_lddt", "--against", "boltz", "--boltz-python", "python"]) == 2
    assert "triangle_multiplication" in capsys.readouterr().err


def test_data_figures(capfd):
    arguments = ["bench-data", "tests/data/*.tar", "--grid", "1x1,2x3", "--crop", "400", "--samples", "1"]
    assert main([*arguments, "--json"]) == 0
    whole, tile = json.loads(capfd.readouterr().out)["cases"]
    assert (whole["grid"], tile["grid"], tile["crop"]) == ("1x1", "2x3", 400)
    assert tile["batch_mib"] < whole["batch_mib"] / 4 and 400**2 * 8 / 2**20 < whole["batch_mib"] < whole["peak_mib"]
    assert whole["samples_per_s"] > 0
    assert main([*arguments, "--crop", "99999"]) == 2
    assert "--crop 746" in capfd.readouterr().err
    assert main([*arguments, "--crop", "x"]) == 2
    assert "--crop 384,768" in capfd.readouterr().err
