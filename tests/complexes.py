"""Features of two small real crops, and predictions for them: what the tests of losses compare."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cpfold_train.data.features import msa
from cpfold_train.data.features.atoms import crop_atoms
from cpfold_train.data.features.symmetry import find_symmetry
from cpfold_train.data.schema import FEATURES
from cpfold_train.data.stream.batch import Crop, make_crop, tile_features
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Grid, join_tiles, split
from cpfold_train.vocabulary import DNA, NONPOLYMER, PROTEIN

SAMPLES = 3
"""Diffusion samples of each."""
BINS = 12
Tensors = dict[str, Tensor]


def structure_of(key: str) -> Structure:
    """An entry of the test data; some atoms of its polymers are made unresolved."""
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == key)
    structure = read_sample(entry)[0]
    kept = np.random.default_rng(3).random(len(structure.resolved)) > 0.1
    resolved = structure.resolved & (kept | ~structure.polymer[structure.atom_token])
    return replace(structure, resolved=resolved, coords=structure.coords * resolved[:, None])


def crop_around_ligand(structure: Structure, counts: dict[int, int]) -> Crop:
    """The last ligand with so many tokens of each kind of molecule, the nearest ones."""
    centre, known = structure.center
    mol_type = structure.chains["mol_type"][structure.asym_id]
    ligand = structure.asym_id == structure.asym_id[mol_type == NONPOLYMER].max()
    apart = np.linalg.norm(centre - centre[ligand & known].mean(0), axis=1)
    chosen = [np.flatnonzero(ligand)]
    for kind, count in counts.items():
        own = np.flatnonzero((mol_type == kind) & ~ligand & known)
        chosen.append(own[np.argsort(apart[own])[:count]])
    tokens = np.sort(np.concatenate(chosen))
    whole = make_crop(structure, {}, crop_size=10_000, max_msa_rows=1, draw=(0, 0, 0))
    rows = msa.assemble(structure, tokens, {}, 1, np.random.default_rng(0))
    atoms = crop_atoms(structure, tokens)
    return replace(whole, tokens=tokens, atoms=atoms, rows=rows, symmetry=find_symmetry(structure, tokens, atoms))


@cache
def crops() -> list[Crop]:
    """Protein, DNA and a ligand; two protein chains and a heme."""
    first = crop_around_ligand(structure_of("7pzb"), {PROTEIN: 21, DNA: 12})
    return [first, crop_around_ligand(structure_of("4hhb"), {PROTEIN: 12})]


NAMES = """
asym_id mol_type token_pad_mask token_resolved_mask token_to_rep_atom token_to_center_atom frames_idx
frame_resolved_mask atom_to_token atom_pad_mask atom_resolved_mask coords bfactor
"""


@cache
def predictions() -> tuple[Tensors, ...]:
    """Of each crop alone: predicted and noised coordinates (M, A, 3), noise levels and logits, in fp64."""
    found = []
    for number, crop in enumerate(crops()):
        generator = torch.Generator().manual_seed(number)

        def normal(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        a, n = len(crop.atoms.atom), len(crop.tokens)
        truth = torch.from_numpy(features_alone(crop)["coords"]).double()
        rotation = torch.linalg.qr(normal(SAMPLES, 3, 3)).Q
        rotation = rotation * torch.linalg.det(rotation)[:, None, None]
        found.append({
            "pred_coords": truth + torch.arange(1, SAMPLES + 1)[:, None, None] * 0.6 * normal(SAMPLES, a, 3),
            "turned_coords": truth @ rotation + 5 * normal(SAMPLES, 1, 3),
            "sigmas": normal(SAMPLES).exp() * 16,
            "plddt": normal(SAMPLES, n, BINS),
            "resolved": normal(SAMPLES, n, 2),
            "pde": normal(SAMPLES, n, n, BINS),
            "pae": normal(SAMPLES, n, n, BINS),
            "bfactor": normal(1, n, BINS),
        })  # fmt: skip
    return tuple(found)


LOGITS = {"plddt": "token", "resolved": "token", "bfactor": "token", "pde": "pair", "pae": "pair"}


def features_alone(crop: Crop, n: int | None = None, a: int | None = None) -> dict[str, np.ndarray]:
    """Features of a crop for one rank, padded to n tokens and a atoms."""
    n, a = n or len(crop.tokens), a or len(crop.atoms.atom)
    found = tile_features(crop, Grid(), n, 1, a)
    return {name: found[name] for name in NAMES.split()}


def batch(grid: Grid) -> tuple[Tensors, Tensors]:
    """Features and predictions of both crops, padded for a grid, whole; and the truth of each diffusion sample."""
    n = grid.pad_tokens(max(len(crop.tokens) for crop in crops()))
    a = grid.pad_atoms(max(len(crop.atoms.atom) for crop in crops()))
    alone = [features_alone(crop, n, a) for crop in crops()]
    feats = {name: torch.from_numpy(np.stack([x[name] for x in alone])) for name in alone[0]}
    feats = {name: x.double() if x.is_floating_point() else x for name, x in feats.items()}
    both = predictions()
    given = {}
    for name in both[0]:
        sizes = [a] if name.endswith("coords") else {"token": [n], "pair": [n, n]}.get(LOGITS.get(name), [])
        padded = []
        for x in (side[name] for side in both):
            missing = [side for dim, size in enumerate(sizes, 1) for side in (size - x.shape[dim], 0)]
            padded.append(pad(x, [0, 0] * (x.ndim - 1 - len(sizes)) + missing[::-1]))
        given[name] = torch.cat(padded)
    truth = {"true_coords": feats["coords"], "true_resolved": feats["atom_resolved_mask"]}
    return feats, given | {name: x.repeat_interleave(SAMPLES, 0) for name, x in truth.items()}


def cut(feats: Tensors, given: Tensors, grid: Grid) -> tuple[Tensors, Tensors]:
    """One rank's part of :func:`batch`."""

    def part(x: Tensor, placement: str) -> Tensor:
        if placement == "atoms":
            return x[:, slice(*split(x.shape[1], grid.cp_size)[grid.cp_index])].clone()
        if placement == "pair":
            return x[:, slice(*grid.row_tokens(x.shape[1])), slice(*grid.col_tokens(x.shape[2]))].clone()
        return x.clone()

    atoms = ["pred_coords", "turned_coords", "true_coords", "true_resolved"]
    placements = LOGITS | dict.fromkeys(atoms, "atoms") | {"sigmas": "whole"}
    own = {name: part(x, placements[name]) for name, x in given.items()}
    return {name: part(x, FEATURES[name].placement) for name, x in feats.items()}, own


def join(parts: list[Tensor], name: str, grid: Grid) -> Tensor:
    """The whole gradient of a prediction from those of all ranks."""
    if name.endswith("coords"):
        return torch.cat(parts, 1)
    if LOGITS[name] == "pair":
        return join_tiles(parts, grid, torch.cat, 1)
    return sum(parts)
