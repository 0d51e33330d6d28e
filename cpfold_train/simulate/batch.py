"""The features that the planner's step is given: those of the largest sample, or those of the data."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from cpfold_train.config.schema import TrainConfig
from cpfold_train.data.stream.batch import ON_HOST, PLACEMENTS
from cpfold_train.data.stream.padding import in_buckets
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.case import ATOMS_PER_TOKEN
from cpfold_train.training.datamodule import TileData

CHAINS, COPIES, NAMINGS = 4, 4, 2
"""Of a homotetramer: its chains, the copies of each, and other namings of a residue's atoms."""


def assumed_batch(config: TrainConfig, grid: Grid, side: int = 1) -> dict[str, Tensor]:
    """The largest batch that the configuration allows, on this rank of the grid.

    Every sample has ``crop_size`` tokens, ``data.max_atoms`` atoms or 8.2 a token, and as many MSA rows and templates
    as may be. Shapes and dtypes are those of :func:`cpfold_train.data.stream.batch.collate`.

    Args:
        config: of the run.
        grid: with the rank.
        side: what the sides of a tile are multiples of; see :class:`cpfold_train.data.stream.padding.Padding`.

    Returns:
        Tensors on the meta device, and ``ON_HOST``, the only one whose values matter, as an array.
    """
    b, data = config.batch_size, config.data
    count = ceil(ATOMS_PER_TOKEN * config.crop_size)
    count = min(count, data.max_atoms or count)
    padding = in_buckets(data.buckets, side, config.crop_size, data.max_msa_rows)
    n, s, a = padding.sizes(grid, config.crop_size, data.max_msa_rows, count)
    a, s, t = a // grid.cp_size, s // grid.rows, data.max_templates
    rows, cols = n // grid.rows, n // grid.cols
    f4, i8, i4, u1 = torch.float32, torch.int64, torch.int32, torch.uint8
    shapes: dict[torch.dtype, dict[str, tuple[int, ...]]] = {
        i8: {
            **dict.fromkeys(("token_index", "residue_index", "asym_id", "entity_id", "sym_id", "mol_type"), (n,)),
            **dict.fromkeys(("method_feature", "modified"), (n,)),
            **dict.fromkeys(("sample_key", "num_tokens"), ()),
            "msa": (s, cols),
        },
        i4: {
            **dict.fromkeys(("token_to_rep_atom", "token_to_center_atom", "atoms_per_token"), (n,)),
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
            **dict.fromkeys(("token_pad_mask", "token_resolved_mask", "token_disto_mask"), (n,)),
            **dict.fromkeys(("cyclic_period", "deletion_mean", "frame_resolved_mask"), (n,)),
            **dict.fromkeys(("res_type", "profile"), (n, 33)),
            "disto_center": (n, 3),
            "template_frame_rot": (max(1, t), n, 3, 3),
            **dict.fromkeys(("template_frame_t", "template_cb", "template_ca"), (max(1, t), n, 3)),
            **dict.fromkeys(("template_mask_cb", "template_mask_frame", "template_mask"), (max(1, t), n)),
            "contact_threshold": (rows, cols),
            **dict.fromkeys(("msa_mask", "has_deletion", "deletion_value", "msa_paired"), (s, cols)),
            **dict.fromkeys(("ref_pos", "coords"), (a, 3)),
            **dict.fromkeys(("ref_charge", "atom_pad_mask", "atom_resolved_mask", "bfactor"), (a,)),
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
    return features | {ON_HOST: start.expand(b, -1).numpy()}


def feature_bytes(batch: dict[str, Tensor]) -> int:
    """What the features of a batch take on the device."""
    return sum(x.nbytes for name, x in batch.items() if name != ON_HOST)


def batches_of_data(config: TrainConfig, grid: Grid, count: int) -> list[dict[str, Tensor]]:
    """The first batches that a run is trained on, on this rank of the grid.

    Raises:
        DataError: they cannot be read.
    """
    without_workers = replace(config.data, num_workers=0)
    accumulate = config.trainer.accumulate_grad_batches
    nowhere = Path(os.devnull)
    data = TileData(without_workers, config.crop_size, config.batch_size, accumulate, config.seed, nowhere)
    rank = SimpleNamespace(cp=SimpleNamespace(grid=grid), root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=rank)
    batches = islice(iter(data.train_dataloader()), count)
    return [{name: batch[name] for name in (*PLACEMENTS, ON_HOST)} for batch in batches]
