"""The features of a batch: name, dtype, dims, who makes them and what they mean. The one list of them.

The loader pads by it, the data module wraps what the ranks hold by it, the planner and the benchmark make up batches
of its shapes, and ``docs/features.md`` is generated from it (``python docs/write_pages.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import GAP, NUM_TOKENS

TILE, ATOMS, REPLICATED, PLAIN, HOST = "tile", "atoms", "replicated", "plain", "host"
"""Placements: a tile of dims 1 (mesh axis cp_row) and 2 (cp_col); of atoms, an equal part of dim 1 for each rank, row
of the grid by row of the grid; the same on all ranks; the same, but a number of the sample that no distributed op
reads, so it stays a plain tensor; the same, but an array that stays on the host.

The array says how much each rank sends. Lightning and DistributedDataParallel take all tensors of a batch to the GPU,
and what reads one there waits for the GPU."""


class Feature(NamedTuple):
    """One feature of a sample.

    Attributes:
        dtype: its name, the same in numpy and torch.
        dims: words for sizes, without the batch dim: ``token``, ``sequence`` (a row of the MSA), ``atom``,
            ``template``, ``chain``, ``copy`` (of a chain), ``order`` (of the equivalent atoms of a residue), or a
            number. ``token+1`` is one more than the number of tokens.
        maker: function of ``cpfold_train.data`` that makes it.
        doc: what it is, with its unit.
        pad: what stands where there is no token, sequence, atom, ...; ``"edge"`` repeats the last real entry.
    """

    dtype: str
    dims: str
    maker: str
    doc: str
    pad: int | str = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return getattr(torch, self.dtype)

    @property
    def placement(self) -> str:
        """How the ranks of a replica hold it, which follows from its dims."""
        if self.dims.startswith(("token token", "sequence token")):
            return TILE
        if self.dims.startswith("atom"):
            return ATOMS
        if self.dims == "token+1":
            return HOST
        return REPLICATED if self.dims else PLAIN

    def shape(self, sizes: Mapping[str, int], grid: Grid) -> tuple[int, ...]:
        """Of one rank's part, without the batch dim.

        Args:
            sizes: padded number of tokens, sequences, atoms, ... of the whole sample, by the words of ``dims``.
            grid: how many ranks share it.
        """
        whole = [self._size(word, sizes) for word in self.dims.split()]
        parts = {TILE: (grid.rows, grid.cols), ATOMS: (grid.cp_size,)}.get(self.placement, ())
        return tuple(size // part for size, part in zip(whole, (*parts, *(1,) * len(whole))))

    @staticmethod
    def _size(word: str, sizes: Mapping[str, int]) -> int:
        if word.isdigit():
            return int(word)
        return sizes["token"] + 1 if word == "token+1" else sizes[word]

    def padded(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A value that may end before ``shape`` does, filled up; itself where it is complete."""
        if value.shape == shape:
            return value
        widths = [(0, size - real) for size, real in zip(shape, value.shape, strict=True)]
        return np.pad(value, widths, **({"mode": "edge"} if self.pad == "edge" else {"constant_values": self.pad}))


_TOKEN, _FRAME, _POSITION = (
    "features.tokens.token_features",
    "features.frames.frame_features",
    "features.atoms.positions_of",
)
_ATOM, _SYMMETRY = "features.atoms.atom_features", "features.symmetry.symmetry_features"
_MSA, _PROFILE = "features.msa.tile", "features.msa.profile"
_TEMPLATE, _BATCH = "features.templates.template_features", "stream.batch.tile_features"

FEATURES: dict[str, Feature] = {
    "token_index": Feature("int64", "token", _TOKEN, "position in the crop"),
    "residue_index": Feature("int64", "token", _TOKEN, "position of the residue in its chain's full sequence, from 0"),
    "asym_id": Feature("int64", "token", _TOKEN, "number of the chain"),
    "entity_id": Feature("int64", "token", _TOKEN, "number of the entity; chains of equal sequence have the same"),
    "sym_id": Feature("int64", "token", _TOKEN, "number of the chain among those of its entity"),
    "mol_type": Feature("int64", "token", _TOKEN, "0 protein, 1 DNA, 2 RNA, 3 nonpolymer"),
    "method_feature": Feature("int64", "token", _TOKEN, "class of the experiment"),
    "modified": Feature("int64", "token", _TOKEN, "1 for a residue of a polymer that is not a standard one"),
    "token_pad_mask": Feature("float32", "token", _TOKEN, "1 where there is a token"),
    "token_resolved_mask": Feature("float32", "token", _TOKEN, "1 where the center atom is resolved"),
    "token_disto_mask": Feature("float32", "token", _TOKEN, "1 where the representative atom is resolved"),
    "cyclic_period": Feature("float32", "token", _TOKEN, "residues of the chain if it is cyclic, else 0"),
    "res_type": Feature("float32", f"token {NUM_TOKENS}", _TOKEN, "residue token, one-hot"),
    "disto_center": Feature("float32", "token 3", _TOKEN, "Å, representative atom, zero where unresolved"),
    "frames_idx": Feature("int32", "token 3", _FRAME, "atoms of the token's frame, the origin in the middle"),
    "frame_resolved_mask": Feature("float32", "token", _FRAME, "1 where these are resolved and not in line"),
    "token_to_rep_atom": Feature(
        "int32", "token", _POSITION, "its representative atom (C-beta, of glycine C-alpha, ...)"
    ),
    "token_to_center_atom": Feature("int32", "token", _POSITION, "its center atom (C-alpha, C1', the ligand's atom)"),
    "profile": Feature(
        "float32",
        f"token {NUM_TOKENS}",
        _PROFILE,
        "frequency of residue tokens in the whole MSA; boltz2: in its rows here",
    ),
    "deletion_mean": Feature(
        "float32", "token", _PROFILE, "mean deletion value in the whole MSA; boltz2: in its rows here"
    ),
    "token_atom_start": Feature(
        "int32", "token+1", _BATCH, "first atom of each token, and the end of the last", "edge"
    ),
    "atoms_per_token": Feature("int32", "token", _BATCH, "number of atoms of each token"),
    "token_bonds": Feature("uint8", "token token 1", "features.tokens.bond_tile", "1 where two tokens are bonded"),
    "type_bonds": Feature("uint8", "token token", "features.tokens.bond_tile", "1 + type of the bond, 0 for none"),
    "contact_conditioning": Feature(
        "uint8", "token token", "features.conditioning.conditioning_tile", "class of what the sample says of the pair"
    ),
    "contact_threshold": Feature(
        "float32", "token token", "features.conditioning.conditioning_tile", "Å, below which it says they are; else 0"
    ),
    "disto_target": Feature("uint8", "token token 1", "features.tokens.distogram_tile", "bin of the true distance"),
    "msa": Feature("int64", "sequence token", _MSA, "residue token", GAP),
    "msa_mask": Feature("float32", "sequence token", _MSA, "1 where there is a sequence and a token"),
    "has_deletion": Feature(
        "float32", "sequence token", _MSA, "1 where residues are inserted before the column; boltz2: 0"
    ),
    "deletion_value": Feature("float32", "sequence token", _MSA, "π/2 atan(inserted residues / 3); boltz2: 0"),
    "msa_paired": Feature("float32", "sequence token", _MSA, "1 where the row is of one organism"),
    "template_restype": Feature("uint8", "template token", _TEMPLATE, "residue token of the template"),
    "template_frame_rot": Feature(
        "float32", "template token 3 3", _TEMPLATE, "axes of the backbone's frame, in columns"
    ),
    "template_frame_t": Feature("float32", "template token 3", _TEMPLATE, "Å, origin of the backbone's frame"),
    "template_cb": Feature("float32", "template token 3", _TEMPLATE, "Å, C-beta (C-alpha of glycine)"),
    "template_ca": Feature("float32", "template token 3", _TEMPLATE, "Å, C-alpha"),
    "template_mask_cb": Feature("float32", "template token", _TEMPLATE, "1 where template_cb is resolved"),
    "template_mask_frame": Feature("float32", "template token", _TEMPLATE, "1 where N, C-alpha and C are resolved"),
    "template_mask": Feature("float32", "template token", _TEMPLATE, "1 where the template covers the token"),
    "visibility_ids": Feature("int32", "template token", _TEMPLATE, "equal where two tokens are seen together"),
    "chain_copies": Feature(
        "int32",
        "chain copy",
        "features.symmetry.find_symmetry",
        "1 + number of each copy of a chain, itself first; 0 for none",
    ),
    "ref_pos": Feature(
        "float32", "atom 3", _ATOM, "Å, reference conformer of the residue, turned and shifted at random"
    ),
    "ref_charge": Feature("float32", "atom", _ATOM, "formal charge"),
    "ref_element": Feature("uint8", "atom", _ATOM, "atomic number"),
    "ref_atom_name_chars": Feature("uint8", "atom 4", _ATOM, "characters of its name, code less 32"),
    "ref_space_uid": Feature("int32", "atom", _ATOM, "number of the residue or ligand in the crop"),
    "atom_to_token": Feature("int32", "atom", _ATOM, "its token"),
    "atom_pad_mask": Feature("float32", "atom", _ATOM, "1 where there is an atom"),
    "atom_resolved_mask": Feature("float32", "atom", _ATOM, "1 where it is resolved"),
    "coords": Feature(
        "float32",
        "atom 3",
        _ATOM,
        "Å, from the mean of the crop's resolved atoms; unresolved: zero, boltz2: minus that mean",
    ),
    "bfactor": Feature("float32", "atom", _ATOM, "Å², zero where unresolved"),
    "copy_coords": Feature("float32", "atom copy 3", _SYMMETRY, "Å, coords in each copy of the atom's chain"),
    "copy_resolved": Feature("uint8", "atom copy", _SYMMETRY, "1 where the atom is resolved in that copy"),
    "atom_swaps": Feature(
        "int32",
        "atom order",
        _SYMMETRY,
        "how many atoms further the equivalent atom is, for each order of the residue's",
    ),
    "sample_key": Feature("int64", "", "stream.batch.make_crop", "key of the draw, from which the model draws its own"),
    "num_tokens": Feature("int64", "", _BATCH, "real tokens"),
}
"""By Boltz-2's names where it has them. Indices of padding point at the first token or atom, and must be masked."""

ON_HOST = "token_atom_start"
"""The one feature whose placement is ``host``."""
