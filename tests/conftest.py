"""Shared fixtures: one pool of ranks for the whole session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
# Triton reads it once, when it is first imported, which Lightning does: it is too late where a test file sets it.
os.environ["TRITON_INTERPRET"] = "1"
# What is printed is as wide as a file, whatever the terminal.
os.environ.pop("COLUMNS", None)

import pytest

LONG = ("training_runs", "plan", "faults", "parity", "fsdp", "bench", "predict_command", "kernels_local", "fake_cuda")
LONG += ("kernels_attention", "finetune_runs", "gpu_check", "kernels_msa", "config", "tf32", "diffusion_parity")
LONG += ("golden",)
FIRST = [f"test_{name}.py" for name in LONG]
"""Files that take longest, the longest first."""


def pytest_collection_modifyitems(items):
    """Long files first: what comes last runs in one process while the other has nothing left to do."""
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Nine processes that any test can use as a world of up to nine ranks."""
    # Not above: the process that only hands out the files has no use for torch.
    from tests.ranks import RankPool

    pool = RankPool(9, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def forked_runs():
    """Runs of ``train.py`` without the time that imports take."""
    from tests.forked_runs import ForkedRuns

    runs = ForkedRuns()
    yield runs
    runs.close()
