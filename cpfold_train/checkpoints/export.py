"""``python -m cpfold_train export-boltz RUN OUT``: a checkpoint that the boltz package loads and predicts with."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpfold_train.checkpoints.boltz import boltz_name, read_checkpoint, weights_of
from cpfold_train.checkpoints.features import features_of
from cpfold_train.errors import ConfigError
from cpfold_train.model.atom_encoder import FEATURES
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import WEIGHTS, MemoryConfig, ModelConfig, MSAConfig, PairformerConfig
from cpfold_train.model.embedding import ContactConditioning
from cpfold_train.vocabulary import BOLTZ2
from cpfold_train.whole_file import whole_file

LIGHTNING_VERSION = "2.5.0"
"""That of the package; Lightning reads it from a checkpoint to bring older ones up to date."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, for boltz predict --checkpoint OUT")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="moving average, or weights under training (default: ema)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint and say what was written.

    Raises:
        ConfigError: the run has no checkpoint, or the checkpoint not all weights of the model; or OUT is a directory.
        DiskFullError: where there is no room.
    """
    source = args.run / "checkpoints" / "last.ckpt" if (args.run / "checkpoints").is_dir() else args.run
    if args.out.is_dir():
        raise ConfigError(f"{args.out} is a directory: type the name of a file, as {args.out / 'boltz.ckpt'}")
    checkpoint = read_checkpoint(source)
    config = model_config(checkpoint, source)
    exported = boltz_checkpoint(config, checkpoint, args.weights, source)
    # The tensors are those of the file that was read, which OUT may be.
    with whole_file(args.out, "wb") as file:
        torch.save(exported, file)
    print(f"{args.out}: {args.weights} weights of {source}, step {exported['global_step']}")
    if config.features != BOLTZ2:
        print(
            f"note: it is trained with the features {config.features}, and the package makes {BOLTZ2}: fine-tune it "
            f"with data.features={BOLTZ2}, or predict by python -m cpfold_train predict {args.out}"
        )
    if predicts(config):
        print(f"Type: boltz predict INPUT --checkpoint {args.out}")
    else:
        print("Boltz2.load_from_checkpoint loads it; boltz predict takes models of the released sizes only")


def model_config(checkpoint: dict[str, Any], path: Path) -> ModelConfig:
    """The sizes that a checkpoint of ours was trained with; ``path`` is for errors."""
    sizes = (checkpoint.get("hyper_parameters") or {}).get("model")
    if sizes is None:
        raise ConfigError(f"{path} does not say how large its model is: type a run, or a checkpoint, of this program")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), sizes, {"features": features_of(checkpoint)})
        return cast(ModelConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} was written by another version of this program: {error}") from error


def boltz_checkpoint(config: ModelConfig, checkpoint: dict[str, Any], weights: str, path: Path) -> dict[str, Any]:
    """What ``torch.save`` is to write: a checkpoint of Lightning for the package's Boltz2.

    Args:
        config: sizes of the model.
        checkpoint: one of ours.
        weights: ``raw`` or ``ema``.
        path: of the checkpoint, for errors.

    Raises:
        ConfigError: it has not just the weights of the model.
    """
    with torch.device("meta"):
        names = {boltz_name(name) for name in CoFolding(config, MemoryConfig()).state_dict()}
    given = weights_of(checkpoint, weights, path)
    if misfits := sorted(names ^ given.keys()):
        raise ConfigError(f"{path} does not hold just the weights of the model: see {', '.join(misfits[:3])}")
    return {
        "state_dict": {name: x.float() if x.is_floating_point() else x for name, x in given.items()},
        "hyper_parameters": hyper_parameters(config),
        # For predictions here; the package does not read it.
        "features": config.features,
        "epoch": checkpoint.get("epoch", 0),
        "global_step": checkpoint.get("global_step", 0),
        "pytorch-lightning_version": LIGHTNING_VERSION,
    }


def predicts(config: ModelConfig) -> bool:
    """Whether ``boltz predict`` takes the model: it sets the sizes of the MSA module and of the Pairformer itself."""
    fixed = ("num_blocks", "num_heads", "msa_s", "msa_blocks", "pairwise_head_width", "pairwise_num_heads")
    parts = (config.msa, MSAConfig()), (config.pairformer, PairformerConfig())
    return all(
        getattr(own, name) == getattr(released, name) for own, released in parts for name in fixed if hasattr(own, name)
    )


def hyper_parameters(config: ModelConfig) -> dict[str, Any]:
    """Arguments of the package's ``Boltz2``, for a model of ours. What training needs in them is Boltz-2's own."""
    diffusion, atoms, own = asdict(config.diffusion), asdict(config.atoms), asdict(config.confidence)
    sizes = {name: atoms.pop(name) for name in ("atom_s", "atom_z")}
    encoder = {name: atoms[name] for name in ("atom_encoder_depth", "atom_encoder_heads")}
    of_network = "token_transformer_depth", "token_transformer_heads", "conditioning_transition_layers", "dim_fourier"
    network = {name: diffusion.pop(name) for name in of_network}
    network |= {"sigma_data": diffusion["sigma_data"], **atoms}
    bins = {name: own[name] for name in ("num_plddt_bins", "num_pde_bins", "num_pae_bins")}
    flags = "add_method_conditioning", "add_modified_flag", "add_cyclic_flag", "add_mol_type_feat"
    return {
        **sizes,
        "token_s": config.token_s,
        "token_z": config.token_z,
        "num_bins": config.num_bins,
        "atom_feature_dim": sum(FEATURES),
        "embedder_args": {**encoder, **dict.fromkeys(flags, True)},
        "msa_args": {**asdict(config.msa), "use_paired_feature": True},
        "pairformer_args": {**asdict(config.pairformer), "v2": True},
        "score_model_args": network,
        "diffusion_process_args": {
            **diffusion,
            **dict.fromkeys(("coordinate_augmentation", "alignment_reverse_diff", "synchronize_sigmas"), True),
        },
        "diffusion_loss_args": {
            "add_smooth_lddt_loss": True,
            "nucleotide_loss_weight": 5.0,
            "ligand_loss_weight": 10.0,
        },
        "confidence_prediction": True,
        "token_level_confidence": True,
        # Without it the package computes no PAE and boltz predict ends with an error.
        "alpha_pae": 1.0,
        "confidence_model_args": {
            "num_dist_bins": own["num_dist_bins"],
            "max_dist": own["max_dist"],
            "add_s_to_z_prod": True,
            "add_s_input_to_s": True,
            "add_z_input_to_z": True,
            "pairformer_args": own["pairformer"],
            "confidence_args": {**bins, "use_separate_heads": True},
        },
        "use_templates": True,
        "use_templates_v2": True,
        "template_args": asdict(config.template),
        "predict_bfactor": True,
        "fix_sym_check": True,
        "cyclic_pos_enc": True,
        "bond_type_feature": True,
        "conditioning_cutoff_min": ContactConditioning.CUTOFF_MIN,
        "conditioning_cutoff_max": ContactConditioning.CUTOFF_MAX,
        "ema": False,
        "validate_structure": False,
        # The package reads these as attributes.
        "training_args": OmegaConf.create(
            {
                "recycling_steps": config.recycling_steps,
                "sampling_steps": 200,
                "diffusion_multiplicity": 32,
                "diffusion_samples": 1,
                "diffusion_loss_weight": 4.0,
                "distogram_loss_weight": 0.03,
                "bfactor_loss_weight": 1e-3,
                "confidence_loss_weight": 1e-4,
                "base_lr": 0.0,
                "max_lr": 1.8e-3,
                "weight_decay": 0.0,
            }
        ),
        "validation_args": OmegaConf.create({"recycling_steps": 3, "sampling_steps": 200, "diffusion_samples": 5}),
    }
