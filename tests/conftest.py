"""Shared fixtures: one pool of ranks for the whole session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
# Triton reads it once, when it is first imported, which Lightning does: it is too late where a test file sets it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.forked_runs import ForkedRuns
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Nine processes that any test can use as a world of up to nine ranks."""
    pool = RankPool(9, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def forked_runs():
    """Runs of ``train.py`` without the time that imports take."""
    runs = ForkedRuns()
    yield runs
    runs.close()
