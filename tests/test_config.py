"""The configuration tree, and what wrong input is answered with."""

from __future__ import annotations

import glob
import inspect
import os
import socket
import sys
from dataclasses import fields, replace

import hydra
import lightning.pytorch as pl
import pytest
from omegaconf import OmegaConf

from cpfold_train.__main__ import main as command
from cpfold_train.cli.train import main
from cpfold_train.config.check import check
from cpfold_train.config.composition import register, run_stamp, typed_config
from cpfold_train.config.schema import CONFIDENCE, FinetuneConfig, TrainerConfig
from cpfold_train.config.world import (
    RANK_OF,
    check_machines,
    ignore_other_launchers,
    is_first_rank,
    plan_world,
    starts_ranks,
)
from cpfold_train.errors import ConfigError
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.parallel.grid import Grid, squarest
from cpfold_train.paths import CONF

NOT_FOR_USERS = {
    "strategy": "follows from cp.grid and dp",
    "devices": "follows from cp.grid and dp",
    "logger": "metrics.csv always, wandb.enabled for W&B",
    "callbacks": "made by the run",
    "enable_checkpointing": "a run always leaves a checkpoint",
    "default_root_dir": "hydra.run.dir",
    "use_distributed_sampler": "the loader divides the samples itself",
    "overfit_batches": "would draw other crops each time; recipe=overfit learns one complex by heart",
    "limit_test_batches": "there is no test loop",
    "limit_predict_batches": "there is no predict loop",
    "plugins": "objects, not values",
    "barebones": "would switch off what a run directory holds",
    "sync_batchnorm": "there is no batch norm",
    "reload_dataloaders_every_n_epochs": "the loader goes through the epochs itself",
    "enable_autolog_hparams": "resolved.yaml holds the configuration",
    "model_registry": "belongs to a hosted service",
}


def compose(*overrides: str):
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    """What the command says before it exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


def assert_refused(monkeypatch, capsys, argument: str, words: list[str]) -> None:
    """One sentence that has all the words."""
    recipe, _, rest = argument.partition(" ") if argument.startswith("recipe=") else ("", "", argument)
    told = refusal(monkeypatch, capsys, *filter(None, (recipe, rest)))
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    for word in words:
        assert word in told


def test_every_trainer_argument_has_a_key():
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert {field.name for field in fields(TrainerConfig)} == arguments - set(NOT_FOR_USERS)


@pytest.mark.parametrize("group", ["model", "trainer", "data", "optim", "recipe"])
def test_every_file_fits_the_schema(group):
    for path in (CONF / group).glob("*.yaml"):
        config = compose(f"{group}={path.stem}")
        OmegaConf.to_object(config)
        assert not OmegaConf.missing_keys(config)


def test_defaults_of_the_schema_are_those_of_the_files():
    """Models that are made without ``conf`` are Boltz-2, and nothing of theirs is recomputed otherwise."""
    typed = typed_config(compose("model=boltz2"))
    assert (typed.model, typed.memory, typed.finetune) == (ModelConfig(), MemoryConfig(), FinetuneConfig())


def test_crops_of_the_large_recipe_grow_to_the_size_that_is_typed():
    typed = typed_config(compose("recipe=finetune_boltz2_large_crop", "crop_size=2048"))
    assert typed.data.crop_schedule == {0: 768, 200: 1536, 1000: 2048}
    assert typed.largest_crop == 2048
    assert typed_config(compose("crop_size=512", "data.crop_schedule={44: 768}")).largest_crop == 768


def test_recipe_beats_the_defaults_and_the_command_line_beats_the_recipe():
    assert compose("recipe=large_crop").crop_size == 3072
    assert compose("recipe=large_crop", "crop_size=64").crop_size == 64


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("cp.grid=2x", ["cp.grid=2x2"]),
        ("cp.grid=0x2", ["cp.grid=1x2"]),
        ("dp=some", ["dp=auto"]),
        ("trainer.max_step=3", ["trainer.max_steps"]),
        ("+nothing=1", ["nothing"]),
        ("trainer.max_steps=abc", ["trainer.max_steps", "'abc'", "type trainer.max_steps=-1 or more"]),
        ("compile=maybe", ["type compile=true or compile=false"]),
        ("dp=100000", ["cp.grid=2x2 with dp=100000", "at most 1024"]),
        ("model=nothing", ["quickstart", "boltz2"]),
        ("ckpt_path=nothing.ckpt", ["nothing.ckpt"]),
        ("data.train=[nothing/*.tar]", ["nothing/*.tar"]),
        ("crop_size=0", ["crop_size=1"]),
        ("cp.timeout_s=0", ["cp.timeout_s"]),
        ("profile.steps=[3]", ["profile.steps", "[10,12]"]),
        ("profile.steps=[3,2]", ["profile.steps", "[10,12]"]),
        ("kernels=fast", ["kernels=auto", "kernels=triton", "kernels=cuequivariance"]),
        ("data.crop_schedule={-1: 48}", ["data.crop_schedule={1000: 768"]),
        ("data.crop_schedule=768", ["data.crop_schedule={1000: 768"]),
        ("diffusion.sampling_steps=1", ["diffusion.sampling_steps=2"]),
        ("diffusion.validation_steps=1", ["diffusion.validation_steps", "2"]),
        ("diffusion.samples=0", ["diffusion.samples=1"]),
        ("optim.decay_every=0", ["optim.decay_every=1"]),
        ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches=1"]),
        ("optim.lr=nan", ["optim.lr=1e-4"]),
        ("optim.betas=[0.9,1.0]", ["[0.9,0.95]"]),
        ("optim.weight_decay=-1", ["optim.weight_decay=0"]),
        ("optim.ema_decay=1", ["optim.ema_decay"]),
        ("trainer.gradient_clip_algorithm=foo", ["trainer.gradient_clip_algorithm=norm"]),
        ("trainer.num_nodes=0", ["trainer.num_nodes=1"]),
        ("seed=-1", ["seed=0"]),
        ("model.msa.msa_s=0", ["model.msa.msa_s=1"]),
        ("model.diffusion.sigma_data=nan", ["model.diffusion.sigma_data=16"]),
        ("memory.residual=fp8", ["memory.residual=fp32", "memory.residual=bf16"]),
        ("finetune.lora.alpha=inf", ["finetune.lora.alpha=16"]),
        ("data.augmentation.contact=1", ["data.augmentation.contact"]),
        ("data.augmentation.pocket=-1", ["data.augmentation.pocket"]),
        ("data.val=[{shards: [a.tar]}]", ["data.val", "a.tar"]),
        ("data.train=[{shards: 5}]", ["data.train[0]"]),
        ("recipe=finetune_boltz2_large_crop data.crop_schedule={500: 768}", ["data.crop_schedule=null"]),
        ("data.crop=round", ["data.crop=spatial", "data.crop=contiguous"]),
        ("data.max_msa_rows=0", ["data.max_msa_rows=1"]),
        ("trainer.precision=16-mixed", ["trainer.precision=bf16-mixed"]),
        ("trainer.precision=transformer-engine", ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]),
        ("trainer.log_every_n_steps=0", ["trainer.log_every_n_steps=1"]),
        ("trainer.val_check_interval=0.5", ["trainer.check_val_every_n_epoch=1", "whole number"]),
        ("model.num_bins=32", ["model.num_bins=64"]),
        ("model.pairformer.num_heads=5", ["model.token_s=35"]),
        ("model.init_from=nothing.ckpt", ["nothing.ckpt", "model.init_from=null"]),
        ("model.init_weights=mean", ["model.init_weights=raw", "model.init_weights=ema"]),
        ("model.confidence.pairformer.num_heads=5", ["model.token_s=35"]),
        ("model.atoms.atom_decoder_heads=5", ["model.atoms.atom_s=35"]),
    ],
)
def test_wrong_input_gets_one_sentence(monkeypatch, capsys, argument, words):
    assert_refused(monkeypatch, capsys, argument, words)


SHIPPED = {
    # Clipping, moving average, Adam and schedule: AlphaFold 3's, but for a lower peak that is reached sooner.
    "trainer.gradient_clip_val": 10.0,
    "trainer.gradient_clip_algorithm": "norm",
    "optim.ema_decay": 0.999,
    "optim.lr": 1.8e-4,
    "optim.warmup_steps": 200,
    "optim.decay": 0.95,
    "optim.decay_every": 50_000,
    "optim.betas": [0.9, 0.95],
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    # The process of diffusion: Boltz-2's, which is AlphaFold 3's but for step_scale.
    "model.diffusion.sigma_data": 16.0,
    "model.diffusion.P_mean": -1.2,
    "model.diffusion.P_std": 1.5,
    "model.diffusion.sigma_max": 160.0,
    "model.diffusion.sigma_min": 1e-4,
    "model.diffusion.rho": 7.0,
    "model.diffusion.gamma_0": 0.8,
    "model.diffusion.gamma_min": 1.0,
    "model.diffusion.noise_scale": 1.003,
    "model.diffusion.step_scale": 1.5,
    # Dropout and recycling: Boltz-2's.
    "model.recycling_steps": 3,
    "model.msa.msa_dropout": 0.15,
    "model.msa.z_dropout": 0.25,
    "model.pairformer.dropout": 0.25,
    "model.template.dropout": 0.25,
    "model.confidence.pairformer.dropout": 0.25,
    # Weights of the losses: Boltz-2's.
    "loss.diffusion": 4.0,
    "loss.smooth_lddt": 4.0,
    "loss.distogram": 0.03,
    "loss.bfactor": 1e-3,
    "loss.plddt": 1e-4,
    "loss.resolved": 1e-4,
    "loss.pde": 1e-4,
    "loss.pae": 1e-4,
}
"""What a fine-tuning of the released model ships with, by key."""


def test_shipped_values():
    tuned, quickstart = compose("recipe=finetune_boltz2_large_crop"), compose()
    assert {key: OmegaConf.select(tuned, key) for key in SHIPPED} == SHIPPED
    other = {"model.recycling_steps": 1, "optim.ema_decay": 0.99, "optim.lr": 1.8e-3, "optim.warmup_steps": 20}
    other |= {f"loss.{name}": 0.0 for name in CONFIDENCE}
    assert {key: OmegaConf.select(quickstart, key) for key in SHIPPED} == SHIPPED | other


def test_wandb_absent(monkeypatch, capsys):
    monkeypatch.setattr("cpfold_train.config.check.find_spec", lambda name: None)
    assert "pip install" in refusal(monkeypatch, capsys, "wandb.enabled=true")


def test_kernels_that_cannot_run(monkeypatch):
    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            check(OmegaConf.to_object(compose("kernels=cuequivariance", *overrides)))
        return str(error.value)

    monkeypatch.setattr("cpfold_train.kernels.choice.find_spec", lambda name: None)
    assert "pip install -e '.[cuequivariance]'" in refused()
    monkeypatch.setattr("cpfold_train.kernels.choice.find_spec", lambda name: name)
    assert "trainer.accelerator=gpu" in refused()
    assert "trainer.precision=bf16-mixed" in refused("trainer.accelerator=gpu")
    check(
        OmegaConf.to_object(
            compose("kernels=cuequivariance", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
        )
    )


def test_world_follows_the_grid_or_the_launcher(monkeypatch):
    world = plan_world("2x3", 2, 1, "cpu", {})
    assert (str(world.grid), world.grid.dp, world.devices) == ("2x3", 2, 12)
    assert plan_world("auto", 1, 1, "cpu", {}).devices == 1
    elastic = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    world = plan_world("auto", 2, 1, "cpu", elastic)
    assert (str(world.grid), world.grid.dp, world.num_nodes, world.devices) == ("2x2", 2, 2, 4)
    with pytest.raises(ConfigError, match=r"cp\.grid=3x3 .*\b9\b"):
        plan_world("3x3", 1, 1, "cpu", elastic)
    slurm = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
    assert plan_world("2x2", "auto", 1, "cpu", slurm).grid.dp == 2
    assert plan_world("2x2", 1, 1, "cpu", slurm | {"SLURM_JOB_NAME": "bash"}).devices == 4
    with pytest.raises(ConfigError, match=r"\b3 .*\b2 .*cp\.grid and dp"):
        plan_world("1x3", 1, 2, "cpu", {})
    monkeypatch.setattr("cpfold_train.config.world._gpus", lambda: 2)
    with pytest.raises(ConfigError, match=r"\b4 .*\b2: .*cp\.grid=1x2"):
        plan_world("2x2", 1, 1, "gpu", {})
    assert plan_world("auto", 1, 1, "gpu", {}).devices == 2


def test_who_starts_the_ranks():
    """Not a rank that another process has started, and not on several machines."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
    elastic = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world = plan_world("1x2", 1, 1, "cpu", {})
    assert starts_ranks(world, {}) and starts_ranks(world, slurm | {"SLURM_JOB_NAME": "bash"})
    assert not any(starts_ranks(world, env) for env in (slurm, elastic, {RANK_OF: str(os.getppid())}))
    assert not starts_ranks(plan_world("1x2", 1, 2, "cpu", {}), {})


LEFT = {
    "MASTER_ADDR": "somehost.invalid",
    "MASTER_PORT": "29500",
    "NODE_RANK": "1",
    "RANK": "3",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "8",
}
"""Of another launcher."""


def test_leftovers_of_other_launchers_are_ignored():
    """A notebook server is the only task of a job, or in its batch script."""
    notebook = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "jupyter", "SLURM_JOB_ID": "12"}
    in_srun = notebook | {"SLURM_STEP_ID": "0", "SLURM_TASK_PID": "1"}
    for left in (LEFT, notebook, in_srun, notebook | {"SLURM_NTASKS": "8"}, {"TORCHELASTIC_RUN_ID": "none"}):
        env = dict(left)
        names = ignore_other_launchers(env)
        assert names and set(names) == set(left) - set(env)
        assert starts_ranks(plan_world("1x2", 1, 1, "cpu", env), env) and is_first_rank(env)
    srun = {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_TASK_PID": "1", "SLURM_PROCID": "1"}
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}
    for started in (
        srun,
        torchrun,
        {**LEFT, RANK_OF: str(os.getppid())},
        {**in_srun, "SLURM_TASK_PID": str(os.getpid())},
    ):
        assert not ignore_other_launchers(dict(started))


def test_leftovers_are_named_in_one_sentence(monkeypatch, capsys):
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)
    told = refusal(monkeypatch, capsys, "crop_size=0")
    assert told.count("\n") == 2
    assert "MASTER_ADDR, MASTER_PORT, NODE_RANK, RANK, LOCAL_RANK, WORLD_SIZE\nerror: crop_size" in told


def test_leftovers_are_named_by_predict_too_and_on_one_machine_by_choice(monkeypatch, capsys):
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)
    assert "LOCAL_RANK, WORLD_SIZE\nerror: crop_size" in refusal(
        monkeypatch, capsys, "crop_size=0", "trainer.num_nodes=1"
    )
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)
    assert command(["predict", "none.ckpt", "none.tar", "--out", "none", "--accelerator", "cpu"]) == 2
    assert "LOCAL_RANK, WORLD_SIZE\nerror: no shard matches none.tar" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_ranks_wait_for_it():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": "0"}
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} .*type another"):
            check_machines(2, env)
        # The machine that joins does not listen.
        check_machines(2, env | {"NODE_RANK": "1"})
    check_machines(2, env)


def test_one_rank_speaks():
    assert is_first_rank({}) and not is_first_rank({RANK_OF: str(os.getppid())})
    assert not is_first_rank({"RANK": "2", "LOCAL_RANK": "0"})
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
    assert is_first_rank(slurm) and not is_first_rank(slurm | {"SLURM_PROCID": "2"})
    # A run that is started in a shell within an allocation starts its ranks itself.
    assert not is_first_rank(slurm | {"SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"})


def test_torchrun_ranks_share_a_run_directory(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_stamp() == run_stamp()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert run_stamp() == "slurm-12.1"
    # Runs that a user starts in a shell within one allocation are not one run.
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert "slurm" not in run_stamp()


@pytest.mark.parametrize(
    ("ranks", "per_node", "grid"),
    [(16, 8, "4x4"), (12, 6, "4x3"), (12, None, "3x4"), (2, 1, "2x1"), (8, 2, "4x2"), (32, 8, "4x8"), (9, 3, "3x3")],
)
def test_rows_of_the_grid_stay_on_one_machine(ranks, per_node, grid):
    found = Grid(*squarest(ranks, per_node))
    assert str(found) == grid
    on_nodes = [{rank // per_node for rank in range(ranks) if replace(found, rank=rank).row == row} if per_node else {0}
                for row in range(found.rows)]  # fmt: skip
    assert all(len(nodes) == 1 for nodes in on_nodes)


def test_rows_that_span_machines_are_told():
    elastic = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "6"}
    assert plan_world("auto", 1, 1, "cpu", elastic).grid.cols == 3
    assert plan_world("auto", 1, 1, "cpu", elastic).note() is None
    assert "cp.grid=4x3" in plan_world("3x4", 1, 1, "cpu", elastic).note()
    assert plan_world("3x4", 1, 1, "cpu", {}).note() is None
    # Three replicas of 2x2 on two machines of six: one of them is on both, but none of its rows.
    assert plan_world("2x2", 3, 1, "cpu", elastic).note() is None


def test_paths_of_the_quickstart_exist():
    config = compose()
    for pattern in (*config.data.train, *config.data.val):
        assert glob.glob(pattern)


def test_gpu_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("cpfold_train.config.world._gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=cpu"):
        plan_world("1x1", 1, 1, "gpu", {})
