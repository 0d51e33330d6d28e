"""That the ranks which share a sample hold parts of the same one."""

from __future__ import annotations

from typing import Any

import torch

from cpfold_train.errors import DataError
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.gather import gather_on_hosts
from cpfold_train.parallel.random import key_of


def check_same_samples(batch: dict[str, Any], cp: ContextParallel) -> None:
    """Compare the samples and crops of a batch, eight bytes a rank, before anything is computed from them.

    It is said from host to host: the GPUs may be at work on the batch before.

    Ranks choose samples without asking each other. Shards that differ from machine to machine, or bytes that only one
    of them reads wrong, would otherwise mix tiles of different samples without a word.

    Raises:
        DataError: on every rank of a replica whose ranks hold different samples.
    """
    tokens = [int(index.sum()) for index in batch["residue_index"]]
    key = key_of(*batch["id"], *batch["num_tokens"].tolist(), *tokens)
    keys = gather_on_hosts(torch.tensor(key), cp, "comparison of samples")[[*cp.all.ranks]].tolist()
    if len(set(keys)) > 1:
        others = [rank for rank, other in zip(cp.all.ranks, keys) if other != key]
        raise DataError(
            f"ranks {', '.join(map(str, others))} hold other samples than rank {cp.grid.rank}, which shares "
            f"{', '.join(batch['id'])} with them: give all machines the same shards, and look at quarantine.jsonl for "
            "files that one of them cannot read"
        )
