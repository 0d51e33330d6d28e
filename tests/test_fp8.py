"""How Transformer Engine is called, against a stand-in for it: a CPU has no fp8, and nothing here measures it."""

from __future__ import annotations

import ast
import re
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch

from cpfold_train.config.check_precision import check_precision
from cpfold_train.config.schema import TrainerConfig
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig, PairformerConfig
from cpfold_train.model.pairformer import PairformerModule
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.training.precision import Fp8Precision
from tests import fp8_stand_in
from tests.parity import randomise
from tests.test_training_runs import TINY, rows_of

N, C_S, C_Z = 9, 32, 16


def gradients(cp, fp8: bool):
    """Two blocks that run twice, as in recycling, each computed again in the backward pass; one layer is frozen."""
    fp8_stand_in.install()
    fp8_stand_in.calls.clear()
    precision = Fp8Precision("cpu")
    module = PairformerModule(C_S, C_Z, PairformerConfig(2, 4, 0.25, 16, 1), MemoryConfig())
    randomise(module)
    frozen = module.layers[0].transition_z.fc1.weight.requires_grad_(False)
    kinds = [type(m) for m in module.modules()]
    generator = torch.Generator().manual_seed(2)
    s, z = torch.randn(1, N, C_S, generator=generator), torch.randn(1, N, N, C_Z, generator=generator)
    with precision.forward_context() if fp8 else torch.autocast("cpu", torch.bfloat16):
        for cycle in range(2):
            draws = RandomStreams(torch.tensor([3])).at("cycle", cycle)
            s, z = module(s, z, torch.ones(1, N), cp, draws)
        loss = z.float().square().mean() + s.square().mean()
    forward = len(fp8_stand_in.calls)
    if fp8:
        with precision.fp8():
            loss.backward()
    else:
        loss.backward()
    assert [type(m) for m in module.modules()] == kinds
    assert frozen.grad is None and not frozen.requires_grad
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"s": s.detach(), "z": z.detach(), **grads}, fp8_stand_in.calls[:forward], fp8_stand_in.calls[forward:]


@pytest.fixture(scope="module")
def both(ranks):
    (plain,), (fp8,) = ranks.run(gradients, 1, 1, False), ranks.run(gradients, 1, 1, True)
    return plain, fp8


def test_blocks_in_fp8_are_the_blocks_in_bf16(both):
    """81 pairs are not a multiple of 8: they come padded, or the stand-in would have refused them."""
    (expected, *none), (actual, *_) = both
    assert none == [[], []]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 0.03, f"{name}: {error}"


def test_what_is_computed_in_fp8(both):
    _, (_, forward, backward) = both
    transition, attention, output = (64, C_Z), (2 * C_Z, C_Z), (C_Z, C_Z)
    # Nothing of the single track, which is in fp32, and no bias of a head, which is too narrow.
    assert {shape for shape, _ in forward} == {transition, (C_Z, 64), attention, output}
    assert {shape for shape, _ in backward} == {shape for shape, _ in forward}
    # A block is computed again for the graph, and what it does by rows once more for the gradient.
    assert len(backward) == 2 * len(forward)
    assert sum(graph for _, graph in forward) == 0 and sum(graph for _, graph in backward) == len(forward)


@pytest.mark.parametrize("precision", ["transformer-engine", "bf16-true"])
def test_a_run(forked_runs, tmp_path, precision):
    """The whole model under Lightning: with fp8, blocks are computed in it forward and backward."""
    widths = ["model.token_z=16", "model.pairformer.pairwise_head_width=16", "model.pairformer.pairwise_num_heads=1"]
    run = ["cp.grid=1x1", "data.val=[]", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}"]
    arguments = [*TINY, *widths, *run, f"trainer.precision={precision}"]
    process = forked_runs.run(1, arguments, "tests.fp8_stand_in:main")
    (row,) = rows_of(process, tmp_path)
    assert 0 < float(row["train/loss"]) < float("inf")
    calls, backward = map(int, re.search(r"stand-in: (\d+) calls, (\d+) for", process.stdout).groups())
    assert calls > backward > 0 if precision == "transformer-engine" else calls == 0
    assert f"z in {{torch.{'bfloat16' if precision == 'bf16-true' else 'float32'}}}" in process.stdout


PACKAGE = find_spec("transformer_engine")
"""Its Python files install anywhere; they import on machines with its CUDA part only, so they are read."""


def definitions(file: str) -> dict[str, ast.AST]:
    """Functions and classes of a file of the package, by name."""
    tree = ast.parse((Path(PACKAGE.origin).parent / file).read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


@pytest.mark.skipif(PACKAGE is None, reason="transformer-engine is not installed")
def test_stand_in_has_the_signatures_of_the_package():
    """The real package takes the arguments that the stand-in takes, and has it where it is imported from."""
    initial = (Path(PACKAGE.origin).parent / "pytorch/__init__.py").read_text()
    assert "import Linear\n" in initial and "import autocast\n" in initial
    autocast = definitions("pytorch/quantization.py")["autocast"]
    if isinstance(autocast, ast.ClassDef):
        autocast = next(node for node in autocast.body if getattr(node, "name", "") == "__init__")
    assert set(signature(fp8_stand_in.autocast).parameters) <= set(arguments(autocast))
    methods = {
        node.name: node for node in definitions("pytorch/module/linear.py")["Linear"].body if hasattr(node, "name")
    }
    assert set(signature(fp8_stand_in.Linear.__init__).parameters) <= set(arguments(methods["__init__"]))
    # The weight is looked up by this name when the layer is called, so another can be given for one call.
    assert arguments(methods["forward"])[:2] == ["self", "inp"]
    assert "'weight'" in ast.unparse(methods["__init__"])
    assert "Float8CurrentScaling" in definitions("common/recipe/__init__.py")


def test_fp8_that_cannot_run(monkeypatch):
    def refused(accelerator: str) -> str:
        with pytest.raises(ConfigError) as error:
            check_precision(TrainerConfig(accelerator=accelerator, precision="transformer-engine"))
        return str(error.value)

    assert "type trainer.accelerator=gpu" in refused("cpu")
    assert "type trainer.accelerator=gpu" in refused("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "an old one" in refused("gpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "pip install -e '.[te]'" in refused("gpu")
    modules = {}
    fp8_stand_in.install(modules)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    check_precision(TrainerConfig(accelerator="gpu", precision="transformer-engine"))
