"""A training step on tensors that say they are on a GPU: all of it is there, and the host never waits for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_cuda import device
from tests.test_training_runs import SMALL

ROOT = Path(__file__).parents[1]
WAITS_ALLOWED = {"cpfold_train/losses/smooth_lddt.py": "how many pairs of atoms are near, in each block of rows"}
"""Where the host may wait for the device in a micro-batch, by file. What is logged is read after it."""
WITH_ALL = [
    *SMALL,
    "data.val=[]",
    "data.max_templates=1",
    "model.confidence.pairformer.pairwise_head_width=4",
    "diffusion.sampling_steps=2",
    "loss.plddt=0.1",
    "loss.resolved=0.1",
    "loss.pde=0.1",
    "loss.pae=0.1",
    "memory.offload=true",
]
"""Templates, the confidence module on sampled structures, and offload."""

needs_compiler = pytest.mark.skipif(
    shutil.which(device.COMPILER) is None or not (device.TORCH / "include" / "ATen").is_dir() or torch.version.cuda,
    reason="needs g++, torch's headers and a torch without CUDA",
)


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    return device.compile_guard(tmp_path_factory.mktemp("guard"))


def waits(guard: Path, *steps: list[str]) -> list[dict[str, str]]:
    """Of each step of rank 1 of 2x2: why the host waits, by line."""
    settings = " + ".join(" ".join([*WITH_ALL, *step]) for step in steps).split(" ")
    command = [sys.executable, "-m", "tests.fake_cuda.step", str(guard), *settings]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [{where: why for why, where, _ in found} for found in json.loads(done.stdout)]


def unexpected(found: dict[str, str]) -> dict[str, str]:
    return {where: why for where, why in found.items() if where.partition(":")[0] not in WAITS_ALLOWED}


@needs_compiler
def test_a_step_does_not_wait_for_the_device(guard):
    (found,) = waits(guard, ["trainer.precision=bf16-mixed", "cp.algorithm=alltoall"])
    assert not unexpected(found)
    # They are seen: what is allowed is there.
    assert {where.partition(":")[0] for where in found} == {*WAITS_ALLOWED}


@needs_compiler
@pytest.mark.slow
def test_no_step_waits_for_the_device(guard):
    steps = [
        [f"trainer.precision={precision}", f"cp.algorithm={algorithm}"]
        for precision, algorithm in (("32-true", "ring"), ("bf16-true", "alltoall"), ("bf16-mixed", "ring"))
    ]
    for found in waits(guard, *steps):
        assert not unexpected(found)
