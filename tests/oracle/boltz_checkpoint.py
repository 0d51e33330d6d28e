"""Checkpoints of the stock package; needs only the ``boltz`` package.

    python boltz_checkpoint.py make FOLDER
    python boltz_checkpoint.py load FOLDER

``make`` reads arguments of Boltz2 from released.pt and settings.pt. It writes name and shape of every tensor of the
first model to names.pt, and to stock.ckpt a checkpoint of the second as the package's training does, with random
weights, another moving average, settings in OmegaConf, optimizer and callbacks. ``load`` loads out.ckpt as
boltz predict does and writes its weights and the number of its parameters to state.pt.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from boltz.model.layers import initialize
from boltz.model.models.boltz2 import Boltz2
from omegaconf import OmegaConf

# Weights are replaced, and drawing those of the released model takes a minute.
initialize.trunc_normal_init_ = lambda *args, **kwargs: None


def build(path):
    settings = torch.load(path, weights_only=True)
    given = OmegaConf.create(settings | {"training_args": {"max_lr": 1e-3, "weight_decay": 0.0}, "validation_args": {}})
    return Boltz2(**{name: given[name] for name in given})


def make(folder):
    with torch.device("meta"):
        released = build(folder / "released.pt")
    torch.save({name: list(x.shape) for name, x in released.state_dict().items()}, folder / "names.pt")

    torch.manual_seed(3)
    model = build(folder / "settings.pt")
    state = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    for name in state:
        # One parameter under two names.
        state[name] = state.get(name.replace("output_projection.0.", "output_projection_linear."), state[name])
    model.load_state_dict(state, strict=True)
    average = {name: x + 1 for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    checkpoint = {
        "epoch": 3,
        "global_step": 700,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"max_lr": 1e-3, "base_lrs": [1e-3], "_last_lr": [1e-3]}],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(model.hparams),
        "ema": {"cur_step": 700, "ema_weights": average},
    }
    torch.save(checkpoint, folder / "stock.ckpt")


def load(folder):
    from boltz.main import Boltz2DiffusionParams, BoltzSteeringParams, MSAModuleArgs, PairformerArgsV2

    model = Boltz2.load_from_checkpoint(
        folder / "out.ckpt",
        strict=True,
        predict_args={},
        map_location="cpu",
        diffusion_process_args=asdict(Boltz2DiffusionParams()),
        ema=False,
        use_kernels=False,
        pairformer_args=asdict(PairformerArgsV2()),
        msa_args=asdict(MSAModuleArgs()),
        steering_args=asdict(BoltzSteeringParams()),
    )
    count = sum(p.numel() for p in model.parameters())
    torch.save({"state": model.state_dict(), "parameters": count}, folder / "state.pt")


{"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
