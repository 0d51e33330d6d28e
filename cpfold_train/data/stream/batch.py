"""From a sample to one rank's part of a batch: draw a crop and all that is random about it, compute features, pad.

A feature has a placement, and a rank computes only its part of it: no rank ever allocates N x N. What is drawn is a
pure function of the sample and of (seed, epoch, position), the same on every rank of any grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpfold_train.data.alignments.alignment import Alignment
from cpfold_train.data.features import msa
from cpfold_train.data.features.atoms import CropAtoms, atom_features, crop_atoms, positions_of
from cpfold_train.data.features.conditioning import Condition, conditioning_tile, draw_conditions
from cpfold_train.data.features.frames import frame_features
from cpfold_train.data.features.symmetry import Symmetry, find_symmetry, symmetry_features
from cpfold_train.data.features.templates import Template, draw_templates, template_features
from cpfold_train.data.features.tokens import bond_tile, distogram_tile, token_features
from cpfold_train.data.stream.crop import SPATIAL, Focus, crop_tokens
from cpfold_train.data.stream.padding import Padding
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import key_of, numpy_generator

_NAMES = {
    "replicate": (
        "token_index residue_index asym_id entity_id sym_id mol_type method_feature modified token_pad_mask "
        "token_resolved_mask token_disto_mask cyclic_period deletion_mean res_type profile disto_center "
        "token_to_rep_atom token_to_center_atom atoms_per_token frames_idx frame_resolved_mask "
        "template_restype template_frame_rot template_frame_t template_cb template_ca template_mask_cb "
        "template_mask_frame template_mask visibility_ids chain_copies sample_key num_tokens"
    ),
    "tile": (
        "token_bonds type_bonds contact_conditioning contact_threshold disto_target "
        "msa msa_mask has_deletion deletion_value msa_paired"
    ),
    "atoms": (
        "ref_pos ref_charge ref_element ref_atom_name_chars ref_space_uid atom_to_token atom_pad_mask "
        "atom_resolved_mask coords bfactor copy_coords copy_resolved atom_swaps"
    ),
}
PLACEMENTS = {name: placement for placement, names in _NAMES.items() for name in names.split()}
"""How the ranks of a replica hold each batched feature: all the same; as tiles of dims 1 (cp_row) and 2 (cp_col); or,
of atoms, as one share of dim 1 a rank, row of the grid by row of the grid."""
ON_HOST = "token_atom_start"
"""What says how much each rank sends, (B, n + 1), the same on all. An array, not a tensor: Lightning and
DistributedDataParallel take all tensors of a batch to the GPU, and whoever reads one there waits for the GPU."""

NO_PADDING = Padding()


@dataclass(frozen=True)
class Augmentation:
    """What a training sample is drawn with. The defaults draw nothing: validation is always the same.

    Attributes:
        single_sequence: probability that it comes without its alignments.
        random_depth: the number of its MSA rows is drawn from 1 ... ``max_msa_rows``.
        random_templates: how many and which of its templates are drawn; else they are the first ones.
        pocket: probability that residues of a pocket are given away, and again of another one after each.
        contact: the same for pairs of tokens in contact.
    """

    single_sequence: float = 0.0
    random_depth: bool = False
    random_templates: bool = False
    pocket: float = 0.0
    contact: float = 0.0


@dataclass(frozen=True)
class Crop:
    """A sample cut to size, before it is padded and tiled.

    Attributes:
        tokens: (n,) int64 tokens of the structure, ascending.
        atoms: their atoms.
        rows: assembled and sampled MSA rows.
        templates: those that the model sees.
        conditions: what is given away of pockets and contacts.
        motions: (residues, 7) normal deviates that turn and shift the reference conformers.
        symmetry: other namings of the ground truth.
        sample_key: key of this draw, from which the model draws its own randomness.
    """

    structure: Structure
    tokens: np.ndarray
    atoms: CropAtoms
    rows: msa.Rows
    templates: list[Template]
    conditions: list[Condition]
    motions: np.ndarray
    symmetry: Symmetry
    sample_key: int


def make_crop(
    structure: Structure,
    alignments: dict[int, Alignment],
    templates: Sequence[Template] = (),
    *,
    crop_size: int,
    max_msa_rows: int,
    max_templates: int = 4,
    crop: Mapping[str, float] = SPATIAL,
    max_atoms: int | None = None,
    focus: Focus = (),
    augmentation: Augmentation = Augmentation(),
    draw: tuple[int, int, int],
) -> Crop:
    """Draw a crop and its features: a pure function of the sample and of ``draw``, (seed, epoch, position)."""
    seed, epoch, position = draw
    rng = numpy_generator(seed, "crop", epoch, position)
    tokens = crop_tokens(structure, rng, max_tokens=crop_size, max_atoms=max_atoms, kinds=crop, focus=focus)
    atoms = crop_atoms(structure, tokens)

    rng = numpy_generator(seed, "msa", epoch, position)
    alone = rng.random() < augmentation.single_sequence
    depth = int(rng.integers(1, max_msa_rows + 1)) if augmentation.random_depth else max_msa_rows
    rows = msa.assemble(structure, tokens, {} if alone else alignments, depth, rng)

    rng = numpy_generator(seed, "templates", epoch, position)
    if augmentation.random_templates:
        seen = draw_templates(list(templates), max_templates, rng)
    else:
        seen = list(templates[:max_templates])

    rng = numpy_generator(seed, "conditions", epoch, position)
    conditions = draw_conditions(structure, tokens, atoms, augmentation.pocket, augmentation.contact, rng)
    residues = int(atoms.residue.max(initial=-1)) + 1
    motions = numpy_generator(seed, "conformers", epoch, position).normal(size=(residues, 7))
    symmetry = find_symmetry(structure, tokens, atoms)
    return Crop(structure, tokens, atoms, rows, seen, conditions, motions, symmetry, key_of(seed, epoch, position))


def tile_features(
    crop: Crop, grid: Grid, n: int, s: int, a: int, t: int = 1, others: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Features of a crop for one rank.

    Padding is zero, and a gap in ``msa``: indices of padded tokens and atoms point at the first one and must be masked.
    Only ``token_atom_start`` goes on, with the number of atoms: token i owns the atoms from its i-th entry to the next.

    Args:
        n: padded number of tokens, a multiple of R * C.
        s: padded number of MSA rows, a multiple of R.
        a: padded number of atoms, a multiple of R * C windows.
        t: padded number of templates.
        others: padded numbers of chains, copies of a chain and other namings of a residue; the crop's own if None.

    Returns:
        Token features (n, ...), ``token_atom_start`` (n + 1,) int32, pair features (n / R, n / C, ...), MSA features
        (s / R, n / C), atom features (a / RC, ...), template features (t, n, ...), ``sample_key``, ``num_tokens`` and
        ``id``.
    """
    structure, tokens, atoms = crop.structure, crop.tokens, crop.atoms
    rows, columns, share = grid.row_tokens(n), grid.col_tokens(n), grid.atoms(a)
    profile, deletion_mean = msa.profile(crop.rows)
    token = {
        **token_features(structure, tokens),
        **frame_features(structure, tokens, atoms),
        "token_to_rep_atom": positions_of(structure, tokens, atoms, structure.disto_atom),
        "token_to_center_atom": positions_of(structure, tokens, atoms, structure.center_atom),
        "profile": profile,
        "deletion_mean": deletion_mean,
    }
    token = {name: _pad(value, n) for name, value in token.items()}
    start = np.pad(atoms.start.astype(np.int32), (0, n - len(tokens)), "edge")
    token["atoms_per_token"] = np.diff(start)
    atom = atom_features(structure, atoms, crop.motions, share)
    template = template_features(crop.templates, structure, tokens, t)
    chains, copies, namings = others or crop.symmetry.sizes
    other = symmetry_features(structure, atoms, crop.symmetry, share)
    sizes = {"copy_coords": copies, "copy_resolved": copies, "atom_swaps": namings}
    return {
        **token,
        ON_HOST: start,
        **bond_tile(structure, tokens, rows, columns),
        **conditioning_tile(crop.conditions, len(tokens), rows, columns),
        "disto_target": distogram_tile(token["disto_center"], token["token_disto_mask"], rows, columns),
        **msa.tile(crop.rows, grid.msa_rows(s), columns),
        **{name: _pad(value, share[1] - share[0]) for name, value in atom.items()},
        **{name: _pad(value, t, n) for name, value in template.items()},
        **{name: _pad(value, share[1] - share[0], sizes[name]) for name, value in other.items()},
        "chain_copies": _pad(crop.symmetry.chain_copies, chains, copies),
        "sample_key": np.int64(crop.sample_key),
        "num_tokens": np.int64(len(tokens)),
        "id": structure.meta["id"],
    }


def _pad(value: np.ndarray, *sizes: int) -> np.ndarray:
    """With zeros, up to ``sizes`` in the first dims."""
    padded = np.zeros((*sizes, *value.shape[len(sizes) :]), dtype=value.dtype)
    padded[tuple(map(slice, value.shape))] = value
    return padded


def collate(crops: list[Crop], grid: Grid, padding: Padding = NO_PADDING) -> dict[str, Any]:
    """Pad crops to a common size that the grid divides, and stack this rank's tiles.

    Args:
        crops: the samples.
        grid: this rank's place.
        padding: what the sizes are multiples of.

    Returns:
        Tensors (B, ...), ``token_atom_start`` (B, n + 1) as an array, and ``id``, a list of B strings. There is at
        least one template, if an empty one: every parameter of the model takes part in every step.
    """
    sizes = [(len(crop.tokens), len(crop.rows.sampled), len(crop.atoms.atom)) for crop in crops]
    n, s, a = padding.sizes(grid, *map(max, zip(*sizes)))
    t = max(1, *(len(crop.templates) for crop in crops))
    others = tuple(map(max, zip(*(crop.symmetry.sizes for crop in crops))))
    samples = [tile_features(crop, grid, n, s, a, t, others) for crop in crops]
    # Taken out one by one, so that the tiles are not in memory twice.
    batch = {name: torch.from_numpy(np.stack([sample.pop(name) for sample in samples])) for name in PLACEMENTS}
    return {**batch, ON_HOST: np.stack([sample[ON_HOST] for sample in samples]), "id": [s["id"] for s in samples]}
