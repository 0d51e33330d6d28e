"""Checkpoints in and out: of the stock package, strictly, and of our own runs."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch

from cpfold_train.__main__ import main
from cpfold_train.checkpoints.boltz import boltz_name, initialise, read_checkpoint
from cpfold_train.checkpoints.export import hyper_parameters, predicts
from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.structures.components import component
from cpfold_train.errors import ConfigError
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
from cpfold_train.vocabulary import AMINO_ACIDS
from tests.parity import randomise

CONFIG = ModelConfig(
    16, 8, 64, 1,
    MSAConfig(), PairformerConfig(), AtomConfig(8, 4, 1, 2, 1, 2), DiffusionConfig(2, 4, 1, 12),
    TemplateConfig(6, 1, 0.1, 4, 2), ConfidenceConfig(PairformerConfig(1, 4, 0.1, 4, 2), 10, 20.0, 9, 11, 12),
)  # fmt: skip
"""Small, but for what boltz predict fixes."""
SMALL = replace(CONFIG, msa=MSAConfig(8, 1, 0.1, 0.1, 4, 2), pairformer=PairformerConfig(2, 4, 0.1, 4, 2))
ORACLE = Path(__file__).parent / "oracle"


def stock_package(script: str, *arguments: str) -> None:
    """Run a script with the package."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    subprocess.run([python, str(ORACLE / script), *arguments], check=True)


def write_settings(config: ModelConfig, path: Path) -> None:
    """The package's arguments for a model of ours, in plain values."""
    given = hyper_parameters(config)
    del given["training_args"], given["validation_args"]
    torch.save(given, path)


def state(model: CoFolding) -> dict[str, torch.Tensor]:
    return {boltz_name(name): x for name, x in model.state_dict().items()}


def our_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as our training writes it; returns the moving average in it."""
    model = CoFolding(SMALL, MemoryConfig())
    randomise(model)
    weights = {f"model.{name}": x for name, x in model.state_dict().items()}
    average = {name: x + 1 if x.is_floating_point() else x for name, x in weights.items()}
    hyper = {"model": asdict(SMALL)}
    written = {"state_dict": average, "current_model_state": weights, "global_step": 40, "hyper_parameters": hyper}
    torch.save(written, path)
    return average


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with a small checkpoint that the package wrote, and the tensors of its released model."""
    folder = tmp_path_factory.mktemp("stock")
    write_settings(CONFIG, folder / "settings.pt")
    write_settings(ModelConfig(), folder / "released.pt")
    stock_package("boltz_checkpoint.py", "make", str(folder))
    return folder


def test_number_of_parameters():
    """Of the released model, and of a smaller one without templates and confidence."""
    with torch.device("meta"):
        model = CoFolding(ModelConfig(), MemoryConfig())
        small = CoFolding(ModelConfig(pairformer=PairformerConfig(num_blocks=48)), MemoryConfig())
    assert sum(p.numel() for p in model.parameters()) == 506_724_992
    counts = [
        sum(p.numel() for p in module.parameters())
        for module in (small, small.trunk.template_module, small.confidence_module)
    ]
    assert counts[0] - sum(counts[1:]) == 432_178_112


def test_tensors_of_the_released_model(stock):
    with torch.device("meta"):
        ours = {name: list(x.shape) for name, x in state(CoFolding(ModelConfig(), MemoryConfig())).items()}
    assert ours == torch.load(stock / "names.pt")


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_weights_of_the_package(stock, weights):
    checkpoint = torch.load(stock / "stock.ckpt", weights_only=False)
    expected = checkpoint["state_dict"] if weights == "raw" else checkpoint["ema"]["ema_weights"]
    model = CoFolding(CONFIG, MemoryConfig())
    initialise(model, stock / "stock.ckpt", weights)
    ours = state(model)
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        assert torch.equal(x, expected[name]), name


def test_round_trip(stock, tmp_path, capsys):
    """The package's weights, ours, exported, and loaded by the package strictly."""
    model = CoFolding(CONFIG, MemoryConfig())
    initialise(model, stock / "stock.ckpt", "raw")
    weights = {f"model.{name}": x for name, x in model.state_dict().items()}
    hyper = {"model": asdict(CONFIG)}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": weights, "hyper_parameters": hyper, "global_step": 7}, run / "checkpoints" / "last.ckpt")
    assert main(["export-boltz", str(run), str(tmp_path / "out.ckpt"), "--weights", "raw"]) == 0
    out = capsys.readouterr().out
    assert "step 7" in out and "boltz predict INPUT --checkpoint" in out
    stock_package("boltz_checkpoint.py", "load", str(tmp_path))
    loaded = torch.load(tmp_path / "state.pt")
    expected = torch.load(stock / "stock.ckpt", weights_only=False)["state_dict"]
    assert loaded["state"].keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in loaded["state"].items())
    assert loaded["parameters"] == sum(p.numel() for p in model.parameters())


def test_boltz_predict(tmp_path):
    """The command itself takes an exported checkpoint, and writes a structure of what it was asked for."""
    torch.manual_seed(1)
    # The package computes scores from 64 bins.
    config = replace(CONFIG, confidence=replace(CONFIG.confidence, num_pae_bins=64, num_pde_bins=64))
    model = CoFolding(config, MemoryConfig())
    randomise(model)
    written = {f"model.{name}": x for name, x in model.state_dict().items()}
    torch.save({"state_dict": written, "hyper_parameters": {"model": asdict(config)}}, tmp_path / "last.ckpt")
    export = ["export-boltz", str(tmp_path / "last.ckpt"), str(tmp_path / "tuned.ckpt"), "--weights", "raw"]
    assert main(export) == 0
    (tmp_path / "input.yaml").write_text("sequences:\n  - protein: {id: A, sequence: GASKW, msa: empty}\n")
    (tmp_path / "components.json").write_text(json.dumps({name: heavy_atoms(name) for name in (*AMINO_ACIDS, "UNK")}))
    stock_package("boltz_predict.py", str(tmp_path))
    (path,) = (tmp_path / "out").rglob("*.cif")
    atoms = gemmi.read_structure(str(path))[0]["A"]
    assert [residue.name for residue in atoms] == ["GLY", "ALA", "SER", "LYS", "TRP"]
    assert all(np.isfinite(atom.pos.tolist()).all() for residue in atoms for atom in residue)


def heavy_atoms(name: str) -> list[list]:
    found = component(name)
    names = [atom.decode() for atom in found.names]
    return [list(row) for row in zip(names, *(x.tolist() for x in (found.elements, found.charges, *found.pos.T)))]


def test_what_the_package_predicts_with():
    assert predicts(ModelConfig()) and predicts(CONFIG)
    assert not predicts(SMALL) and not predicts(ModelConfig(pairformer=PairformerConfig(num_blocks=48)))


def test_own_checkpoints(tmp_path):
    average = our_checkpoint(tmp_path / "own.ckpt")
    assert main(["export-boltz", str(tmp_path / "own.ckpt"), str(tmp_path / "out.ckpt")]) == 0
    for source, weights in (("own.ckpt", "ema"), ("out.ckpt", "raw")):
        model = CoFolding(SMALL, MemoryConfig())
        initialise(model, tmp_path / source, weights)
        for name, x in model.state_dict().items():
            assert torch.equal(x, average[f"model.{name}"].float()), name
    with pytest.raises(ConfigError, match=r"out\.ckpt .*average"):
        initialise(CoFolding(SMALL, MemoryConfig()), tmp_path / "out.ckpt", "ema")


def test_partial_loads_are_refused(tmp_path):
    """What does not fit is named, nothing is read, and what is left out must be said."""
    our_checkpoint(tmp_path / "own.ckpt")
    written = torch.load(tmp_path / "own.ckpt")
    average = written["state_dict"]
    templates = [name for name in average if ".template_module." in name]
    for name in templates:
        del average[name]
    average["model.affinity_module.weight"] = torch.zeros(3)
    average["model.trunk.s_init.weight"] = torch.zeros(4, 16)
    torch.save(written, tmp_path / "other.ckpt")

    model = CoFolding(SMALL, MemoryConfig())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ConfigError) as refused:
        initialise(model, tmp_path / "other.ckpt", "ema")
    text = str(refused.value)
    assert f"template_module: {len(templates)} " in text
    assert "affinity_module: 1 " in text and "affinity_module.weight" in text
    assert re.search(r"s_init: 1 .*s_init\.weight 4x16 .*16x16", text)
    assert "model.init_skip=[affinity_module,s_init,template_module]" in text
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    initialise(model, tmp_path / "other.ckpt", "ema", ["affinity_module", "s_init", "template_module"])
    for name, x in model.state_dict().items():
        kept = name.startswith(("trunk.s_init.", "trunk.template_module."))
        assert torch.equal(x, before[name] if kept else average[f"model.{name}"].float()), name
    with pytest.raises(ConfigError, match=r"model\.init_skip .*confidence_modul\b"):
        initialise(model, tmp_path / "other.ckpt", "ema", ["confidence_modul"])


class Foreign:
    """What no checkpoint should hold."""


def test_code_in_checkpoints_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"validators": Foreign()}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match=r"foreign\.ckpt .*tests\.test_boltz_checkpoint\.Foreign"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    with pytest.raises(ConfigError, match=r"text\.ckpt"):
        read_checkpoint(tmp_path / "text.ckpt")
    with pytest.raises(ConfigError, match=r"none\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")
