"""Random inputs of one rank: representations and logits with gradients, features of a complex, and weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from cpfold_train.data.schema import FEATURES, ON_HOST
from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import Inputs, Sizes

_ATOM_VOLUME = 18.0
"""Cubic Angstrom of an atom of a protein, hydrogens aside."""


def make_inputs(
    names: tuple[str, ...], config: ModelConfig, sizes: Sizes, grid: Grid, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Those of the named inputs that have gradients, standard normal.

    Args:
        names: some keys of the shapes below; others are ignored.
        dtype: of what has the size of z or m in training; the others are in fp32 at least.
    """
    n, samples = sizes.n, sizes.samples
    tile, tokens, atoms = (n // grid.rows, n // grid.cols), n // grid.cp_size, sizes.atoms // grid.cp_size
    bins = config.confidence
    shapes = {
        "s": (1, n, config.token_s),
        "s_inputs": (1, n, config.token_s),
        "z": (1, *tile, config.token_z),
        "rel_pos": (1, *tile, config.token_z),
        "m": (1, sizes.msa_depth // grid.rows, tile[1], config.msa.msa_s),
        "a": (samples, tokens, 2 * config.token_s),
        "s_of_tokens": (samples, tokens, 2 * config.token_s),
        "token_bias": (1, config.diffusion.token_transformer_heads, *tile),
        "denoised_coords": (samples, atoms, 3),
        "plddt_logits": (samples, n, bins.num_plddt_bins),
        "resolved_logits": (samples, n, 2),
        "pde_logits": (samples, *tile, bins.num_pde_bins),
        "pae_logits": (samples, *tile, bins.num_pae_bins),
    }
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    return {
        name: torch.randn(
            shapes[name],
            dtype=dtype if name in ("z", "rel_pos", "m") else at_least_fp32,
            device=device,
            requires_grad=True,
        )
        for name in names
        if name in shapes
    }


def precision(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, AbstractContextManager]:
    """Of the weights, and in what an op is called, so that bf16 is what it is in ``trainer.precision=bf16-true``: z and
    m in bf16 and products under autocast, weights and the parts of the model that are fp32 islands in fp32."""
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    return torch.promote_types(dtype, torch.float32), mixed


def make_features(names: tuple[str, ...], sizes: Sizes, grid: Grid, device: torch.device) -> Inputs:
    """Features of a globular dimer without padding, seen in a template, and what its M noised samples are like.

    The values are made up here; their dtypes are the schema's.

    Args:
        names: inputs of the op; with ``pair_features`` among them there are those of pairs of tokens.
    """
    n, (first, stop) = sizes.n, grid.atoms(sizes.atoms)
    own, side = stop - first, (_ATOM_VOLUME * sizes.atoms) ** (1 / 3)
    start = torch.arange(n + 1) * sizes.atoms // n
    token = torch.searchsorted(start, torch.arange(first, stop), right=True) - 1
    index = torch.arange(n)
    chain = index >= n // 2
    feats = {
        "asym_id": chain,
        "sym_id": chain,
        "entity_id": torch.zeros(n),
        "cyclic_period": torch.zeros(n),
        "mol_type": torch.zeros(n),
        "residue_index": index,
        "token_index": index,
        "token_pad_mask": torch.ones(n),
        "token_resolved_mask": torch.ones(n),
        "token_to_rep_atom": start[:-1],
        "token_to_center_atom": start[:-1],
        "atoms_per_token": start.diff(),
        "frames_idx": start[:-1, None] + torch.arange(3),
        "chain_copies": torch.tensor([[1, 2], [2, 1]]),
        "ref_pos": torch.randn(own, 3),
        "ref_charge": torch.zeros(own),
        "ref_element": torch.full((own,), 6),
        "ref_atom_name_chars": torch.zeros(own, 4),
        "ref_space_uid": token,
        "atom_to_token": token,
        "atom_pad_mask": torch.ones(own),
        "atom_resolved_mask": torch.ones(own),
        "coords": side * torch.rand(own, 3),
        "copy_coords": side * torch.rand(own, 2, 3),
        "copy_resolved": torch.ones(own, 2),
        "atom_swaps": torch.zeros(own, 1),
        "msa_mask": torch.ones(sizes.msa_depth // grid.rows, n // grid.cols),
        **_template(n, side),
    }
    if "pair_features" in names:
        tile = n // grid.rows, n // grid.cols
        feats |= {name: torch.zeros(tile) for name in ("type_bonds", "contact_conditioning")}
        feats |= {"token_bonds": torch.zeros(*tile, 1), "contact_threshold": torch.zeros(tile)}
    feats = {name: x[None].to(device, FEATURES[name].torch_dtype) for name, x in feats.items()}
    return feats | {
        ON_HOST: start[None].int().numpy(),
        "noisy_coords": feats["coords"] + torch.randn(sizes.samples, own, 3).to(device),
        "sigmas": torch.ones(sizes.samples, device=device),
        "times": torch.zeros(sizes.samples, device=device),
    }


def _template(n: int, side: float) -> Inputs:
    """One template of all tokens."""
    return {
        "template_restype": torch.zeros(1, n),
        "template_frame_rot": torch.eye(3).expand(1, n, 3, 3).clone(),
        "template_frame_t": side * torch.rand(1, n, 3),
        "template_cb": side * torch.rand(1, n, 3),
        "template_ca": side * torch.rand(1, n, 3),
        "template_mask_cb": torch.ones(1, n),
        "template_mask_frame": torch.ones(1, n),
        "template_mask": torch.ones(1, n),
        "visibility_ids": torch.zeros(1, n),
    }


def randomise(module: nn.Module) -> None:
    """Small random values for every parameter, so that no part of the backward pass is a multiplication by zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(values + (1.0 if parameter.ndim == 1 else 0.0))


def allocate_gradients(module: nn.Module) -> None:
    """Room for the gradients of weights, which every rank has whole: it is there before a training step starts."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
