"""What is trained and how fast: patterns, freezing, learning rates, LoRA, decay, statistics, start of the schedule."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cpfold_train.checkpoints.boltz import boltz_name, weights_of
from cpfold_train.config.check import check
from cpfold_train.config.check_finetune import require_metric
from cpfold_train.config.schema import FinetuneConfig, LoRAConfig
from cpfold_train.errors import ConfigError
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig
from cpfold_train.model.lora import LowRank, add_adapters, merged
from cpfold_train.training.early_stop import EarlyStop
from cpfold_train.training.freeze import choose_trained, require_same
from cpfold_train.training.learning_rates import learning_rate_factors
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.optim import adamw_with_schedule, base_rate, parameter_groups
from cpfold_train.training.patterns import matching
from cpfold_train.training.reporting.module_statistics import gradients, trained_modules, update_norm
from cpfold_train.training.schedule_start import schedule_start
from tests.test_boltz_whole import CONFIG, DRAWN, OPTIM, SEED, WEIGHTS, crops, features, weights
from tests.test_config import assert_refused, compose

NAMES = ["msa_module.norm.weight", *(f"pairformer_module.layers.{k}.fc{i}.weight" for k in range(12) for i in (1, 2))]


@pytest.fixture
def model() -> CoFolding:
    torch.manual_seed(0)
    return CoFolding(CONFIG, MemoryConfig())


def trained(model: nn.Module) -> set[str]:
    return {boltz_name(name) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("pairformer_module", 24),
        ("pairformer_module.layers.1", 2),
        ("pairformer_module.layers.0-9", 20),
        ("pairformer_module.layers.[0-9]", 20),
        ("*.fc1", 12),
        ("*norm*", 1),
        ("msa_module.norm.weight", 1),
    ],
)
def test_patterns(pattern, count):
    assert len(matching("finetune.freeze", pattern, NAMES)) == count


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("msa_modul", "msa_modul: .*msa_module"),
        ("pairformer_module.layer.0", "layer: .*pairformer_module.layers"),
        ("pairformer_module.layers.12", "pairformer_module.layers .*12: .*0, 1, 2, 3,"),
        ("*.fc1.bias", r"\*.fc1 .*bias: .*weight"),
        ("msa_module.norm.weight.x", "msa_module.norm.weight .*x: "),
    ],
)
def test_a_pattern_of_nothing_is_told_what_is_near(pattern, told):
    with pytest.raises(ConfigError, match=told):
        matching("finetune.freeze", pattern, NAMES)


def test_freeze_and_train(model):
    everything = trained(model)
    assert not any("fourier_embed" in name for name in everything)
    assert choose_trained(model, FinetuneConfig(freeze=["msa_module", "*.norm*"]), True)
    expected = {name for name in everything if not name.startswith("msa_module.") and ".norm" not in name}
    assert trained(model) == expected

    model.requires_grad_(True)
    only = FinetuneConfig(train=["pairformer_module.layers.1"], freeze=["*.bias"])
    assert not choose_trained(model, only, True), "the confidence module is frozen"
    assert trained(model) == {
        name for name in everything if name.startswith("pairformer_module.layers.1.") and not name.endswith(".bias")
    }


def test_nothing_to_train_is_refused(model):
    with pytest.raises(ConfigError, match=r"finetune\.freeze and finetune\.train"):
        choose_trained(model, FinetuneConfig(train=["s_init"], freeze=["s_init"]), True)
    with pytest.raises(ConfigError, match=r"loss\.plddt=1e-4"):
        choose_trained(CoFolding(CONFIG, MemoryConfig()), FinetuneConfig(train=["confidence_module"]), False)
    with pytest.raises(ConfigError, match=r"finetune\.lora\.patterns .*linear_p\b"):
        choose_trained(CoFolding(CONFIG, MemoryConfig()), FinetuneConfig(lora=LoRAConfig(["*.linear_p"])), True)


def test_lora_leaves_the_model_as_it_is_at_first(model):
    """A layer under two names gets one adapter; what ``train`` names is trained beside the adapters."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    patterns = ["*.output_projection_linear", "*.output_projection.0", "pairformer_module"]
    train = ["s_norm", "pairformer_module.layers.0.transition_s.fc1"]
    choose_trained(model, FinetuneConfig(train=train, lora=LoRAConfig(patterns, 3, 6.0)), True)
    after = merged(model.state_dict(), 2.0)
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert {name for name in trained(model) if ".lora_" not in name} == {"s_norm.weight", "s_norm.bias"}
    assert not {name.partition(".")[0] for name in trained(model)} & {"s_init", "msa_module", "distogram_module"}
    layer = model.structure_module.score_model.token_transformer.layers[0]
    assert layer.output_projection[0] is layer.output_projection_linear
    assert len(layer.output_projection_linear.parametrizations.weight) == 1


def test_mixed_precision_merges_as_the_export_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30))
    add_adapters(model, 4, 8.0)
    nn.init.normal_(model[0].parametrizations.weight[0].lora_B)
    with torch.autocast("cpu", torch.bfloat16):
        used = model[0].weight
    assert torch.equal(used, merged(model.state_dict(), 2.0)["0.weight"])


def lora_step(cp, folder: Path, given: str, lora: LoRAConfig | None) -> dict:
    """This rank's parts of the losses of a training step; the parts of the gradients go to a file."""
    module = CoFoldingModule(CONFIG, MemoryConfig(), OPTIM, WEIGHTS, DRAWN, SEED).double()
    if lora:
        choose_trained(module.model, FinetuneConfig(lora=lora), True)
    module.model.load_state_dict(torch.load(folder / given))
    module.train()
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0)
    step = module.training_step(features(crops()[:1], cp.grid, torch.float64), 0)
    step["loss"].backward()
    grads = {name: p.grad / cp.grid.cp_size for name, p in module.model.named_parameters() if p.grad is not None}
    torch.save(grads, folder / f"{given}-{cp.grid.cp_index}")
    return {name: share.item() for name, share in step["partial_losses"].items()}


def test_gradients_of_lora_are_those_of_the_merged_weights(ranks, tmp_path):
    """Every linear layer of the model on 2x2, beside a model on 1x1 whose weights are the sums."""
    lora, scale = LoRAConfig(["*"], 2, 3.0), 1.5
    model = CoFolding(CONFIG, MemoryConfig())
    model.load_state_dict(weights())
    choose_trained(model.double(), FinetuneConfig(lora=lora), True)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.lora_A, std=0.1)
            nn.init.normal_(module.lora_B, std=0.1)
    state = model.state_dict()
    torch.save(state, tmp_path / "lora")
    torch.save(merged(state, scale), tmp_path / "plain")
    (alone,) = ranks.run(lora_step, 1, 1, tmp_path, "plain", None)
    parts = ranks.run(lora_step, 2, 2, tmp_path, "lora", lora)
    assert {name: sum(part[name] for part in parts) for name in alone} == pytest.approx(alone, rel=1e-10)
    plain = torch.load(tmp_path / "plain-0")
    shares = [torch.load(tmp_path / f"lora-{rank}") for rank in range(4)]
    grads = {name: sum(share[name] for share in shares) for name in shares[0]}
    assert all(".0.lora_" in name for name in grads)
    layers = {name.rpartition(".parametrizations.")[0] for name in grads}
    assert len(layers) > 200
    largest = max(g.abs().max() for g in plain.values()).item()
    for layer in layers:
        a, b = (state[f"{layer}.parametrizations.weight.0.lora_{which}"] for which in "AB")
        of_weight = plain[f"{layer}.weight"]
        for which, expected in (("A", scale * b.T @ of_weight), ("B", scale * of_weight @ a.T)):
            found = grads[f"{layer}.parametrizations.weight.0.lora_{which}"]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * largest, msg=f"{layer}.{which}")


def test_checkpoints_are_read_merged(tmp_path):
    layer = nn.Linear(6, 5)
    add_adapters([layer], 2, 4.0)
    nn.init.normal_(layer.parametrizations.weight[0].lora_B)
    state = {f"model.s_init.{name}": x for name, x in layer.state_dict().items()}
    checkpoint = {"state_dict": state, "hyper_parameters": {"finetune": {"lora": {"rank": 2, "alpha": 4.0}}}}
    read = weights_of(checkpoint, "raw", tmp_path)
    assert read.keys() == {"s_init.weight", "s_init.bias"}
    assert torch.equal(read["s_init.weight"], layer.weight)


def test_learning_rates(model):
    """Two Pairformer blocks; LoRA's products learn at the rate of their layer's weight."""
    lora = LoRAConfig(["pairformer_module.layers.0.transition_z"])
    choose_trained(model, FinetuneConfig(train=["*"], lora=lora), True)
    groups = {
        "structure_module": 0.1,
        "*.transition_z.fc[123].weight": 3,
        "pairformer_module.layers.1.transition_z.norm": 5,
    }
    factor = learning_rate_factors(model, 0.5, groups)
    expected = {
        "s_init.weight": 0.125,
        "msa_module.msa_proj.weight": 0.125,
        "pairformer_module.layers.0.pre_norm_s.weight": 0.25,
        "pairformer_module.layers.0.transition_z.fc1.parametrizations.weight.0.lora_A": 0.75,
        "pairformer_module.layers.1.pre_norm_s.weight": 0.5,
        "pairformer_module.layers.1.transition_z.fc1.weight": 1.5,
        "pairformer_module.layers.1.transition_z.norm.bias": 2.5,
        "distogram_module.distogram.weight": 1,
        "confidence_module.pairformer_stack.layers.0.pre_norm_s.weight": 1,
        "structure_module.score_model.a_norm.weight": 0.1,
    }
    ours = {boltz_name(name): name for name, _ in model.named_parameters()}
    assert {name: factor(ours[name]) for name in expected} == pytest.approx(expected)

    optimizer, schedule = adamw_with_schedule(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, lambda step: step + 1, factor)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(rates[id(p)] == pytest.approx(1e-2 * factor(name)) for name, p in learn.items())
    assert base_rate(optimizer) == pytest.approx(1e-2)
    optimizer.step()
    schedule.step()
    assert base_rate(optimizer) == pytest.approx(2e-2)


def test_only_matrices_decay(model):
    """No vector and no embedding, whatever owns it and wherever it is passed; LoRA's products do."""
    choose_trained(model, FinetuneConfig(train=["*"], lora=LoRAConfig(["msa_module"])), True)
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(tables) > 4
    assert decayed == {id(p) for p in parameters.values() if p.ndim == 2} - tables
    exempt = {boltz_name(name) for name, p in parameters.items() if id(p) not in decayed}
    assert "contact_conditioning.encoding_unspecified" in exempt
    assert "msa_module.msa_proj.parametrizations.weight.0.lora_A" not in exempt


def test_statistics_of_a_step():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    model["a"].bias.requires_grad_(False)
    modules = trained_modules(model)
    assert {name: [*parameters] for name, parameters in modules.items()} == {
        "a": ["a.weight"],
        "b": ["b.weight", "b.bias"],
    }
    optimizer, _ = adamw_with_schedule(model, 1e-2, (0.9, 0.95), 1e-8, 0.0, lambda step: 1.0)
    for _ in range(3):
        before = [p.detach().clone() for p in modules["b"].values()]
        model["b"](model["a"](torch.randn(5, 4))).square().sum().backward()
        optimizer.step()
    found = gradients(modules["b"])
    flat = torch.cat([p.grad.flatten() for p in modules["b"].values()])
    assert found["gradient_norm"] == pytest.approx(flat.norm().item(), rel=1e-6)
    moved = torch.cat([(p - x).flatten() for p, x in zip(modules["b"].values(), before)])
    assert update_norm(optimizer, modules["b"]) == pytest.approx(moved.norm().item(), rel=1e-3)
    assert found["non_finite"] == ""
    model["b"].bias.grad[1] = torch.inf
    assert gradients(modules["b"])["non_finite"] == "b.bias"
    assert gradients(modules["a"])["non_finite"] == ""


def test_where_the_schedule_starts(tmp_path):
    own = tmp_path / "run" / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": {}, "global_step": 70}, tmp_path / "a.ckpt")

    def start(step, ckpt_path=None, init_from=None):
        config = SimpleNamespace(optim=SimpleNamespace(start_step=step), ckpt_path=ckpt_path)
        config.model = SimpleNamespace(init_from=init_from)
        return schedule_start(config, tmp_path / "run")

    assert start(None) is None
    assert start(0, str(tmp_path / "a.ckpt")) == 0
    assert start(9) == 9
    assert start(0, str(own)) is None, "a run that goes on in its directory has started already"
    assert start("checkpoint", init_from=str(tmp_path / "a.ckpt")) == 70
    torch.save({"state_dict": {}, "global_step": 2, "lr_schedulers": [{"last_epoch": 102}]}, tmp_path / "b.ckpt")
    assert start("checkpoint", init_from=str(tmp_path / "b.ckpt")) == 102, "it started at 100 itself"
    assert start("checkpoint", str(own), str(tmp_path / "a.ckpt")) is None


def test_another_selection_cannot_resume(model):
    config = FinetuneConfig(freeze=["msa_module"])
    with pytest.raises(ConfigError, match=r"finetune\.freeze: .*model\.init_from"):
        require_same(config, {"hyper_parameters": {"model": {}}}, model)
    require_same(config, {"hyper_parameters": {"finetune": vars(config) | {"lora": vars(config.lora)}}}, model)
    require_same(FinetuneConfig(), {"hyper_parameters": {"model": {}}}, model)


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        ({"lr_groups": {"msa_module": 0.5}}, {"lr_groups": {"msa_module": 0.1}}, ""),
        ({"layer_decay": 0.9}, {"layer_decay": 0.8}, ""),
        ({"layer_decay": 0.9, "lr_groups": {"s_init": 0.5}}, {"layer_decay": 0.8, "lr_groups": {"s_init": 0.3}}, ""),
        ({"lr_groups": {"msa_module": 0.5}}, {"lr_groups": {"msa_module": 2.0}}, "finetune.lr_groups"),
        ({"lr_groups": {"msa_module": 0.5}}, {"lr_groups": {"s_init": 0.5}}, "finetune.lr_groups"),
        ({"layer_decay": 0.9}, {}, "finetune.layer_decay"),
        ({}, {"layer_decay": 0.9, "lr_groups": {"s_init": 0.5}}, "finetune.lr_groups and finetune.layer_decay"),
    ],
)
def test_other_factors_resume_in_the_same_groups(model, then, now, refused):
    """The optimizer's moments belong to weights by their number in the groups."""
    checkpoint = {"hyper_parameters": {"finetune": asdict(FinetuneConfig(**then))}}
    if not refused:
        require_same(FinetuneConfig(**now), checkpoint, model)
        return
    with pytest.raises(ConfigError, match=f"other values of {refused} than .*type other factors .*model.init_from"):
        require_same(FinetuneConfig(**now), checkpoint, model)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("finetune.layer_decay=0", ["finetune.layer_decay", "0.95"]),
        ("finetune.lora.rank=0", ["finetune.lora.rank=1"]),
        ("finetune.lora.alpha=0", ["finetune.lora.alpha"]),
        ("finetune.lr_groups=[structure_module]", ["finetune.lr_groups={structure_module: 0.1}"]),
        ("finetune.lr_groups={structure_module: 0}", ["finetune.freeze"]),
        ("finetune.lr_groups={0: 0.1}", ["finetune.lr_groups={structure_module: 0.1}"]),
        ("finetune.frozen=[s_init]", ["finetune.freeze"]),
        ("optim.start_step=-1", ["optim.start_step"]),
        ("optim.start_step=checkpoint", ["model.init_from"]),
        ("early_stop.monitor=val/los", ["val/loss, val/distogram"]),
        ("early_stop.patience=0", ["early_stop.patience=1"]),
        ("module_statistics.every_n_steps=-1", ["module_statistics.every_n_steps=0"]),
    ],
)
def test_wrong_input_gets_one_sentence(monkeypatch, capsys, argument, words):
    assert_refused(monkeypatch, capsys, argument, words)


def test_a_frozen_confidence_module_cannot_be_watched():
    require_metric("val/plddt", trains_confidence=True)
    require_metric("val/loss", trains_confidence=False)
    with pytest.raises(ConfigError, match=r"early_stop\.monitor=val/plddt .*loss\.plddt=1e-4"):
        require_metric("val/plddt", trains_confidence=False)


def test_patience_is_that_which_is_typed():
    earlier, later = EarlyStop("val/loss", 1, 0.0), EarlyStop("val/loss", 5, 0.0)
    earlier.wait_count = 1
    later.load_state_dict(earlier.state_dict())
    assert (later.wait_count, later.patience) == (1, 5)


def test_early_stop_needs_its_metric():
    from omegaconf import OmegaConf

    for overrides in (["early_stop.monitor=val/loss", "data.val=[]"],
                      ["early_stop.monitor=val/structure_lddt", "diffusion.validation_steps=0"]):  # fmt: skip
        with pytest.raises(ConfigError, match=r"early_stop\.monitor"):
            check(OmegaConf.to_object(compose(*overrides)))
