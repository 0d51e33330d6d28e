"""From a sample to one rank's part of a batch: draw a crop and all that is random about it, compute features, pad.

A feature has a placement (:mod:`cpfold_train.data.schema`), and a rank computes only its part of it: no rank ever
allocates N x N. What is drawn is a pure function of the sample and of (seed, epoch, position), the same on every rank
of any grid.
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
from cpfold_train.data.features.tokens import as_in_boltz2, bond_tile, distogram_tile, token_features
from cpfold_train.data.schema import FEATURES, HOST
from cpfold_train.data.stream.crop import SPATIAL, Focus, crop_tokens
from cpfold_train.data.stream.padding import Padding
from cpfold_train.data.structures.structure import Structure
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import key_of, numpy_generator
from cpfold_train.vocabulary import BOLTZ2, CORRECTED

NO_PADDING = Padding()


@dataclass(frozen=True)
class Augmentation:
    """What a training sample is drawn with. The defaults draw nothing: validation is always the same.

    Attributes:
        single_sequence: probability that it comes without its alignments.
        random_depth: the number of its MSA rows is drawn from 1 ... ``max_msa_rows``.
        random_rows: which rows is drawn, as it always is with the features ``corrected``; else they are the first ones.
        random_templates: how many and which of its templates are drawn; else they are the first ones.
        pocket: probability that residues of a pocket are given away, and again of another one after each.
        contact: the same for pairs of tokens in contact.
    """

    single_sequence: float = 0.0
    random_depth: bool = False
    random_rows: bool = False
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
        symmetry: chains and atoms that the ground truth could exchange.
        sample_key: key of this draw, from which the model draws its own randomness.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
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
    features: str


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
    features: str = CORRECTED,
    draw: tuple[int, int, int],
) -> Crop:
    """Draw a crop and its features: a pure function of the sample and of ``draw``, (seed, epoch, position).

    ``features`` is one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
    """
    seed, epoch, position = draw
    rng = numpy_generator(seed, "crop", epoch, position)
    tokens = crop_tokens(structure, rng, max_tokens=crop_size, max_atoms=max_atoms, kinds=crop, focus=focus)
    atoms = crop_atoms(structure, tokens)
    symmetry = find_symmetry(structure, tokens, atoms)
    if features == BOLTZ2:
        structure = as_in_boltz2(structure)

    rng = numpy_generator(seed, "msa", epoch, position)
    alone = rng.random() < augmentation.single_sequence
    depth = int(rng.integers(1, max_msa_rows + 1)) if augmentation.random_depth else max_msa_rows
    drawn = augmentation.random_rows or features == CORRECTED
    rows = msa.assemble(structure, tokens, {} if alone else alignments, depth, rng if drawn else None, features)

    rng = numpy_generator(seed, "templates", epoch, position)
    if augmentation.random_templates:
        seen = draw_templates(list(templates), max_templates, rng)
    else:
        seen = list(templates[:max_templates])

    rng = numpy_generator(seed, "conditions", epoch, position)
    conditions = draw_conditions(structure, tokens, atoms, augmentation.pocket, augmentation.contact, rng, features)
    residues = int(atoms.residue.max(initial=-1)) + 1
    motions = numpy_generator(seed, "conformers", epoch, position).normal(size=(residues, 7))
    key = key_of(seed, epoch, position)
    return Crop(structure, tokens, atoms, rows, seen, conditions, motions, symmetry, key, features)


def tile_features(
    crop: Crop, grid: Grid, n: int, s: int, a: int, t: int = 1, others: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Features of a crop for one rank.

    Padding is what :data:`~cpfold_train.data.schema.FEATURES` says: indices of padded tokens and atoms point at the
    first one and must be masked. Token i owns the atoms from the i-th entry of ``token_atom_start`` to the next.

    Args:
        n: padded number of tokens, a multiple of R * C.
        s: padded number of MSA rows, a multiple of R.
        a: padded number of atoms, a multiple of R * C windows.
        t: padded number of templates.
        others: padded numbers of chains, of copies of a chain and of equivalent orders of a residue's atoms; the crop's
            own if None.

    Returns:
        The features of the schema, in its shapes and dtypes, and ``id``.
    """
    structure, tokens, atoms = crop.structure, crop.tokens, crop.atoms
    rows, columns, own_atoms = grid.row_tokens(n), grid.col_tokens(n), grid.atoms(a)
    chains, copies, orders = others or crop.symmetry.sizes
    sizes = {"token": n, "sequence": s, "atom": a, "template": t, "chain": chains, "copy": copies, "order": orders}

    def padded(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: FEATURES[name].padded(value, FEATURES[name].shape(sizes, grid)) for name, value in made.items()}

    profile, deletion_mean = msa.profile(crop.rows)
    token = padded({
        **token_features(structure, tokens),
        **frame_features(structure, tokens, atoms, crop.features),
        "token_to_rep_atom": positions_of(structure, tokens, atoms, structure.disto_atom),
        "token_to_center_atom": positions_of(structure, tokens, atoms, structure.center_atom),
        "profile": profile,
        "deletion_mean": deletion_mean,
        "token_atom_start": atoms.start.astype(np.int32),
        "atoms_per_token": np.diff(atoms.start).astype(np.int32),
    })  # fmt: skip
    other = padded({
        **atom_features(structure, atoms, crop.motions, own_atoms, crop.features),
        **template_features(crop.templates, structure, tokens, t, crop.features),
        **symmetry_features(structure, atoms, crop.symmetry, own_atoms),
        "chain_copies": crop.symmetry.chain_copies,
    })  # fmt: skip
    # The loss masks distances of what is unresolved, which the package takes from the origin.
    has_distance = token["token_pad_mask" if crop.features == BOLTZ2 else "token_disto_mask"]
    # Tiles are made at their whole size.
    return {
        **token,
        **other,
        **bond_tile(structure, tokens, rows, columns),
        **conditioning_tile(crop.conditions, len(tokens), rows, columns),
        "disto_target": distogram_tile(token["disto_center"], has_distance, rows, columns),
        **msa.tile(crop.rows, grid.msa_rows(s), columns),
        "sample_key": np.int64(crop.sample_key),
        "num_tokens": np.int64(len(tokens)),
        "id": structure.meta["id"],
    }


def collate(crops: list[Crop], grid: Grid, padding: Padding = NO_PADDING) -> dict[str, Any]:
    """Pad crops to a common size that the grid divides, and stack this rank's tiles.

    Args:
        crops: the samples.
        grid: of this rank.
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
    batch = {name: np.stack([sample.pop(name) for sample in samples]) for name in FEATURES}
    tensors = {name: x if FEATURES[name].placement == HOST else torch.from_numpy(x) for name, x in batch.items()}
    return {**tensors, "id": [sample["id"] for sample in samples]}
