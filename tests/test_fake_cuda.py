"""Steps on tensors that say they are on a GPU: all tensors are there, and the host does not wait for it."""

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
"""Where the host may wait for the device in a micro-batch with ``kernels=torch``, by file; with fused kernels nowhere.
What is logged is read after it."""
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
    words = [" ".join([*step[:1], *WITH_ALL, *step[1:]]) for step in steps]
    command = [sys.executable, "-m", "tests.fake_cuda.step", str(guard), *" + ".join(words).split(" ")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [{where: why for why, where, _ in found} for found in json.loads(done.stdout)]


def files(found: dict[str, str]) -> set[str]:
    return {where.partition(":")[0] for where in found}


@needs_compiler
def test_a_step_does_not_wait_for_the_device(guard):
    (found,) = waits(guard, ["training", "trainer.precision=bf16-mixed", "kernels=triton", "cp.algorithm=alltoall"])
    assert not files(found), found


@needs_compiler
@pytest.mark.slow
def test_nothing_waits_for_the_device(guard):
    steps = [
        ["training", "trainer.precision=32-true", "kernels=torch", "cp.algorithm=ring"],
        ["training", "trainer.precision=bf16-true", "kernels=triton", "cp.algorithm=ring"],
        ["training", "trainer.precision=bf16-mixed", "kernels=torch", "cp.algorithm=alltoall"],
        ["prediction", "trainer.precision=bf16-mixed", "kernels=triton", "diffusion.samples=2"],
        ["validation", "trainer.precision=bf16-mixed", "kernels=triton"],
    ]
    *training, prediction, validation = waits(guard, *steps)
    for step, found in zip(steps, training):
        assert files(found) == ({*WAITS_ALLOWED} if "kernels=torch" in step else set()), found
    assert not prediction
    # Its scores go to the host, batch by batch.
    of_scores = {"cpfold_train/training/validation_metrics.py", "cpfold_train/training/module.py"}
    assert files(validation) == of_scores, validation
