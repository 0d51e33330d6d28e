"""``trainer.detect_anomaly``: NaNs of a backward pass are found where tensors are shards."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from cpfold_train.parallel.anomaly import look_at_local_shards
from tests.test_faults import SMALL


def found_on(cp, of_rank: int, placements: list) -> str:
    """What is found on this rank of a NaN that one rank has in its shard."""
    look_at_local_shards()
    start = torch.full((2, 2), 0.0 if cp.grid.rank == of_rank else 1.0, requires_grad=True)
    with torch.autograd.detect_anomaly():
        shards = DTensor.from_local(start, cp.mesh, placements)
        try:
            # The root of 0 has no finite slope.
            (shards.sqrt() * 0).to_local().sum().backward()
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("placements", [[Shard(0), Shard(1)], [Shard(1), Replicate()]])
@pytest.mark.filterwarnings("ignore")
def test_the_rank_that_has_a_nan_finds_it(ranks, placements):
    found = ranks.run(found_on, 2, 3, 4, placements)
    assert "SqrtBackward0" in found[4]
    assert not any(found[:4] + found[5:])


def test_a_run_ends_with_the_operation_that_made_a_nan(forked_runs, tmp_path):
    given = [*SMALL, "cp.grid=1x2", "data.val=[]", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}"]
    process = forked_runs.run(2, [*given, "trainer.detect_anomaly=true"], "tests.faulty:nan_in_backward")
    assert process.returncode == 1
    assert "Error detected in SqrtBackward0" in process.stderr
    assert 'faulty.py", line' in process.stderr
    assert "error: rank 1 failed: trainer.detect_anomaly=true found a NaN that SqrtBackward0 made" in process.stderr
    assert "Traceback (most recent call last)" not in process.stderr
