"""The features of a sample without their values: what the planner's step is given."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from cpfold_train.parallel.grid import Grid
from cpfold_train.training.config import TrainConfig

ATOMS_PER_TOKEN = 8.2
"""Of a protein with its ligands, hydrogens aside."""
CHAINS, COPIES, NAMINGS = 4, 4, 2
"""Of a homotetramer: its chains, the copies of each, and other namings of a residue's atoms."""


def assumed_batch(config: TrainConfig, grid: Grid) -> dict[str, Tensor]:
    """The largest batch that the configuration allows, on this rank of the grid.

    Every sample has ``crop_size`` tokens, ``data.max_atoms`` atoms or 8.2 a token, and as many MSA rows and templates
    as may be. Shapes and dtypes are those of :func:`cpfold_train.data.batch.collate`.

    Returns:
        ``token_atom_start``, which decides what travels, with its values; the others on the meta device.
    """
    b, data = config.batch_size, config.data
    n = grid.pad_tokens(config.crop_size)
    count = ceil(ATOMS_PER_TOKEN * config.crop_size)
    count = min(count, data.max_atoms or count)
    a, s, t = grid.pad_atoms(count) // grid.cp_size, grid.pad_rows(data.max_msa_rows) // grid.rows, data.max_templates
    rows, cols = n // grid.rows, n // grid.cols
    f4, i8, i4, u1 = torch.float32, torch.int64, torch.int32, torch.uint8
    shapes: dict[torch.dtype, dict[str, tuple[int, ...]]] = {
        i8: {
            **dict.fromkeys("token_index residue_index asym_id entity_id sym_id mol_type".split(), (n,)),
            **dict.fromkeys(("method_feature", "modified"), (n,)),
            **dict.fromkeys(("sample_key", "num_tokens"), ()),
            "msa": (s, cols),
        },
        i4: {
            **dict.fromkeys(("token_to_rep_atom", "token_to_center_atom"), (n,)),
            "frames_idx": (n, 3),
            "visibility_ids": (max(1, t), n),
            "chain_copies": (CHAINS, COPIES),
            **dict.fromkeys(("ref_space_uid", "atom_to_token"), (a,)),
            "atom_swaps": (a, NAMINGS),
        },
        u1: {
            "template_restype": (max(1, t), n),
            "token_bonds": (rows, cols, 1),
            **dict.fromkeys(("type_bonds", "contact_conditioning"), (rows, cols)),
            "disto_target": (rows, cols, 1),
            "ref_element": (a,),
            "ref_atom_name_chars": (a, 4),
            "copy_resolved": (a, COPIES),
        },
        f4: {
            **dict.fromkeys("token_pad_mask token_resolved_mask token_disto_mask".split(), (n,)),
            **dict.fromkeys("cyclic_period deletion_mean frame_resolved_mask".split(), (n,)),
            **dict.fromkeys(("res_type", "profile"), (n, 33)),
            "disto_center": (n, 3),
            "template_frame_rot": (max(1, t), n, 3, 3),
            **dict.fromkeys("template_frame_t template_cb template_ca".split(), (max(1, t), n, 3)),
            **dict.fromkeys("template_mask_cb template_mask_frame template_mask".split(), (max(1, t), n)),
            "contact_threshold": (rows, cols),
            **dict.fromkeys("msa_mask has_deletion deletion_value msa_paired".split(), (s, cols)),
            **dict.fromkeys(("ref_pos", "coords"), (a, 3)),
            **dict.fromkeys("ref_charge atom_pad_mask atom_resolved_mask bfactor".split(), (a,)),
            "copy_coords": (a, COPIES, 3),
        },
    }
    features = {
        name: torch.empty(b, *shape, dtype=dtype, device="meta")
        for dtype, group in shapes.items()
        for name, shape in group.items()
    }
    start = torch.arange(config.crop_size + 1) * count // config.crop_size
    start = torch.cat([start, start[-1:].expand(n - config.crop_size)]).int()
    return features | {"token_atom_start": start.expand(b, -1)}
